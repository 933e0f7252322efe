"""What can be known of a network from its graph alone: effects, regions, branches as data."""

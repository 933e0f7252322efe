"""What scripts/bench measures, and the figures it wrote."""

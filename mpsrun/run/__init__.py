"""What runs in the lead and in the workers: backend, Fork and Join, coordinator, worker, stand-in."""

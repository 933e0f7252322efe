"""`mpsrun daemon`: owns a CUDA MPS daemon, keeps it running, and says who uses it."""

"""NVIDIA's Multi-Process Service, always called CUDA MPS here: its control program, daemon and clients."""

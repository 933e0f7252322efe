"""The launcher: parent of the lead, the workers and the CUDA MPS daemon; it never imports torch."""

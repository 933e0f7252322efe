"""Whether an error says that there was no memory, which leaves the process and its device as they were."""

import torch

# What libraries say instead of torch.OutOfMemoryError: the CUDA runtime, cuBLAS and cuDNN, torch's allocator on a CPU.
NO_MEMORY = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


def lacks_memory(error: Exception) -> bool:
    """Whether there was no memory, as far as the error tells."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)

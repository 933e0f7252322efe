"""Memory that several processes map, and the order in which they touch it: one interface over CPU and CUDA."""

from mpsrun.device.base import Chunk, ChunkHandle, Device, TensorRef, typed_view
from mpsrun.device.cpu import CpuDevice

__all__ = ["Chunk", "ChunkHandle", "CpuDevice", "Device", "TensorRef", "open_device", "typed_view"]


def open_device(kind: str, index: int) -> Device:
    """The device `kind` ("cpu" or "cuda") number `index`, as this process sees it."""
    if kind == "cuda":
        from mpsrun.device.cuda import CudaDevice  # needs cuda-bindings, which a machine without GPU lacks

        return CudaDevice(index)
    return CpuDevice()

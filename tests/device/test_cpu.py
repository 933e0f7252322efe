"""Shared memory and counters between CPU processes."""

import gc
import io
import subprocess
import sys
import threading
import time

import pytest
import torch

from mpsrun.device import ChunkHandle, CpuDevice, TensorRef, typed_view
from mpsrun.device.base import COUNTER_BYTES

READER = """
import sys, torch
from mpsrun.device import ChunkHandle, CpuDevice, TensorRef, typed_view
counters, chunk = (ChunkHandle(int(i), int(s), t.encode()) for i, s, t in (a.split(',') for a in sys.argv[1:3]))
device = CpuDevice()
device.bind_counters(device.open_chunk(counters))
tensor = typed_view(device.open_chunk(chunk), TensorRef(chunk.id, 0, (4,), (1,), 'float32'))
for turn in range(1, 51):
    device.wait([0], [turn], 20.0)
    tensor.mul_(2)
    device.signal([1], [turn])
"""


def device() -> CpuDevice:
    made = CpuDevice()
    made.bind_counters(made.new_chunk(COUNTER_BYTES))
    return made


def as_argument(handle: ChunkHandle) -> str:
    return f"{handle.id},{handle.size_bytes},{handle.token.decode()}"


def test_two_processes_take_turns() -> None:
    lead = CpuDevice()
    counters, chunk = lead.new_chunk(COUNTER_BYTES), lead.new_chunk(4096)
    lead.bind_counters(counters)
    tensor = typed_view(chunk, TensorRef(chunk.id, 0, (4,), (1,), "float32"))
    command = [sys.executable, "-c", READER, as_argument(counters.handle), as_argument(chunk.handle)]
    with subprocess.Popen(command) as process:
        for turn in range(1, 51):
            tensor.fill_(turn)
            lead.signal([0], [turn])
            lead.wait([1], [turn], 30.0)
            assert tensor.tolist() == [2.0 * turn] * 4
    assert process.returncode == 0


def test_wait_has_a_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="counter 3"):
        device().wait([3], [1], 0.2)
    assert 0.2 <= time.monotonic() - start < 2


def test_wait_for_several() -> None:
    lead = device()
    timer = threading.Timer(0.2, lead.signal, ([1, 2], [5, 6]))
    timer.start()
    lead.wait([1, 2], [5, 5], 10.0)
    assert lead.read_counters()[1:3] == [5, 6]
    timer.join()


def test_counters_wrap() -> None:
    """Sequence numbers count modulo 2**32."""
    lead = device()
    lead.signal([0], [0xFFFFFFFE])
    lead.wait([0], [0xFFFFFFFE], 0.1)
    with pytest.raises(TimeoutError):
        lead.wait([0], [3], 0.1)
    lead.signal([0], [3])
    lead.wait([0], [0xFFFFFFFF], 0.1)
    lead.wait([0], [3], 0.1)


@pytest.mark.parametrize(
    "ref",
    [
        TensorRef(0, -8, (2,), (1,), "float32"),
        TensorRef(0, 0, (5000,), (1,), "float32"),
        TensorRef(0, 4092, (2,), (1,), "float32"),
        TensorRef(0, 2, (2,), (1,), "float32"),
        TensorRef(0, 0, (2,), (-1,), "float32"),
        TensorRef(0, 0, (2, 2), (1,), "float32"),
        TensorRef(0, 0, (2,), (1,), "manual_seed"),
        TensorRef(0, 0, (1 << 62, 4), (1 << 62, 1), "float32"),
    ],
)
def test_tensors_outside_of_a_chunk(ref: TensorRef) -> None:
    chunk = CpuDevice().new_chunk(4096)
    with pytest.raises((ValueError, RuntimeError, OverflowError)):
        typed_view(chunk, ref)


def test_export_keeps_what_others_see() -> None:
    """Memory moves inside the storage: values, aliases, views and the size on disk stay."""
    lead = CpuDevice()
    base = torch.arange(12.0)
    view, other = base[2:8].view(2, 3), torch.ones(3, dtype=torch.int64)
    size = saved(base)
    refs = lead.export([base, view, other])
    assert base.tolist() == list(map(float, range(12)))
    base[2] = 40
    assert view[0, 0] == 40
    assert saved(base) == size
    assert refs[0].chunk == refs[1].chunk
    assert refs[1].offset_bytes - refs[0].offset_bytes == 8
    chunks = {i: lead.open_chunk(handle) for i, handle in lead.exported().items()}
    for tensor, ref in zip((base, view, other), refs, strict=True):
        assert torch.equal(typed_view(chunks[ref.chunk], ref), tensor)


def test_export_twice_moves_nothing() -> None:
    lead = CpuDevice()
    tensor = torch.randn(10)
    refs, pointer = lead.export([tensor]), tensor.data_ptr()
    assert lead.export([tensor]) == refs
    assert tensor.data_ptr() == pointer


def test_exported_memory_goes_with_its_tensors() -> None:
    lead = CpuDevice()
    tensors = [torch.randn(1000) for _ in range(5)]
    lead.export(tensors)
    assert lead.exported()
    tensors.clear()
    gc.collect()
    assert not lead.exported()


def test_export_of_nothing() -> None:
    lead = CpuDevice()
    assert lead.export([]) == []
    (ref,) = lead.export([torch.empty(0, 3)])
    assert ref.shape == (0, 3)


def saved(tensor: torch.Tensor) -> int:
    file = io.BytesIO()
    torch.save(tensor, file)
    return len(file.getvalue())

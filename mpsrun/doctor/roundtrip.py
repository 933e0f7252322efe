"""A real round trip between two processes: memory mapped by both, and counters that order them.

`python -m mpsrun.doctor.roundtrip KIND` prints the latency one way in microseconds; on a GPU it is the GPU that waits.
"""

import subprocess
import sys
import time

import msgspec
import torch

from mpsrun.device import ChunkHandle, Device, open_device

ROUNDS = 200
WARM_UP = 20
DEADLINE_S = 30.0
_BYTES = 8192
_THERE, _BACK = 1, 2  # counters
_MARK = 173


class Question(msgspec.Struct, frozen=True):
    """What the second process needs."""

    kind: str
    counters: ChunkHandle
    data: ChunkHandle


def ask(kind: str) -> float:
    """Return the latency one way in us. Raises where memory or counters are not shared."""
    device = open_device(kind, 0)
    counters, data = device.new_chunk(_BYTES), device.new_chunk(_BYTES)
    device.bind_counters(counters)
    question = msgspec.json.encode(Question(kind, counters.handle, data.handle))
    command = [sys.executable, "-P", "-m", "mpsrun.doctor.roundtrip", "--answer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            other.stdin.write(question + b"\n")
            other.stdin.flush()
            if other.stdout.readline() != b"ready\n":
                raise RuntimeError("the second process could not map the memory of the first")
            latency_us = _time(device)
            device.synchronize()
            if int(data.memory[-1]) != _MARK:
                raise RuntimeError("what the second process wrote did not arrive")
        finally:
            other.kill()
    return latency_us


def _time(device: Device) -> float:
    begin_s = 0.0
    is_cuda = device.kind == "cuda"
    for number in range(1, ROUNDS + 1):
        if number == WARM_UP:
            if is_cuda:
                begin = torch.cuda.Event(enable_timing=True)
                begin.record()
            begin_s = time.perf_counter()
        device.signal([_THERE], [number])
        device.wait([_BACK], [number], DEADLINE_S)
    us = (time.perf_counter() - begin_s) * 1e6
    if is_cuda:
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        us = begin.elapsed_time(end) * 1e3
    return us / (ROUNDS - WARM_UP) / 2


def answer() -> None:
    """Be the second process."""
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    device = open_device(question.kind, 0)
    counters, data = device.open_chunk(question.counters), device.open_chunk(question.data)
    device.bind_counters(counters)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for number in range(1, ROUNDS + 1):
        device.wait([_THERE], [number], DEADLINE_S)
        if number == ROUNDS:
            data.memory.fill_(_MARK)
        device.signal([_BACK], [number])
    device.synchronize()
    sys.stdin.buffer.read()  # the memory stays mapped until the first process has looked


if __name__ == "__main__":
    if sys.argv[1] == "--answer":
        answer()
    else:
        sys.stdout.write(f"{ask(sys.argv[1]):.2f}\n")

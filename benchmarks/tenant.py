"""Somebody else on the GPU, for `scripts/adapt`: `load` keeps it busy, `memory` takes nearly all that is free.

Ends when its standard input does.
"""

from __future__ import annotations

import sys
import threading

import torch

LEFT_BYTES = 1 << 30


def main() -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    a = torch.randn(4096, 4096, device="cuda")
    hoard = []
    if sys.argv[1] == "memory":
        while (free := torch.cuda.mem_get_info()[0]) > LEFT_BYTES:
            hoard.append(torch.empty(min(free - LEFT_BYTES // 2, 1 << 30), dtype=torch.uint8, device="cuda"))
    print("there", flush=True)
    while not ended.is_set():
        if sys.argv[1] == "load":
            for _ in range(20):
                a = torch.tanh(a @ a)
            torch.cuda.synchronize()
        else:
            ended.wait(0.1)


if __name__ == "__main__":
    main()

"""What one launch costs beside the network itself: message out, worker awake, answer back.

    python benchmarks/dispatch.py [launches]

The worker runs a network of one addition, so that nearly all of the round trip is dispatch. On a busy machine its tail is
waiting for a core, which the kernel tells of both processes (``/proc/PID/schedstat``): the last line is without it.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from dstack_lab.devices import Cpu

TARGET_US = 200


class Nothing(torch.nn.Module):
    """As little as a network can do."""

    def forward(self, x):  # noqa: D102
        return x + 1


def nothing():
    return Nothing(), torch.zeros(1, 4)


def waiting_us(process: int | str) -> float:
    """How long the main thread of a process has been ready but without a core [us]; NaN where the kernel does not tell."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text(encoding="ascii").split()[1]) / 1e3
    except (OSError, ValueError, IndexError):
        return float("nan")


def main(launches: int = 3000) -> None:
    device = Cpu()
    trip_us, dispatch_us, waited_us = [], [], []
    with device.start(f"{Path(__file__).resolve()}:nothing", device.shares()[0], device.split(device.shares()[0])[0]) as worker:
        worker.wait_ready()
        for i in range(launches + 200):
            before_us = sum(map(waiting_us, ("self", worker.pid)))
            begin = time.perf_counter()
            reply = worker.ask({"op": "run", "id": i, "inputs": [i]}, timeout_s=10)
            end = time.perf_counter()
            if i >= 200:  # the first ones warm caches
                trip_us.append((end - begin) * 1e6)
                dispatch_us.append(trip_us[-1] - reply["service_ms"] * 1e3)
                waited_us.append(sum(map(waiting_us, ("self", worker.pid))) - before_us)
    print(f"{device.describe()}; {launches} launches, one after the other")
    own_us = np.subtract(dispatch_us, waited_us)
    rows = {"round trip": trip_us, "dispatch = round trip - service": dispatch_us, "of which waiting for a core": waited_us}
    for name, values in (rows | {"dispatch without waiting": own_us}).items():
        median, p99 = np.quantile(values, [0.5, 0.99])
        print(f"{name:32} median {median:6.0f} us   p99 {p99:6.0f} us   median / {TARGET_US} us = {median / TARGET_US:.2f}")
    for mark in device.marks():
        print("note:", mark)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))

"""On a worker's path: its GPU backend becomes one that computes nothing and tells what it was given.

With $FAKE_GREEN that of green contexts too, and batches take as long as on some GPU.
"""

import os
import sys
import time
import types
from pathlib import Path


def pace_s(model, batch, gpu_pct):
    """Service time of a network that is as large as its name is long, and can use up to 20 % for each request."""
    return 5e-4 * len(model) * (0.2 + 0.1 * batch) * 100 / min(gpu_pct, 20 * batch, 100)


class FakeCuda:
    gpu_ms = 0.5

    def __init__(self, options):
        self.options = options

    def load(self):
        env = {key: value for key, value in os.environ.items() if key.startswith(("CUDA_", "DSTACK_LAB_"))}
        if message := os.environ.get("FAKE_CUDA_ERROR"):
            raise RuntimeError(message)
        self.fail()
        granted = round(float(env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]) * 132 / 100 - 0.5) // 2 * 2
        granted += int(os.environ.get("FAKE_EXTRA_SMS", "0"))
        self.granted = granted
        told = {"granted_sms": granted, "mps": os.environ.get("FAKE_OUTSIDE") is None, "env": env}
        if os.environ.get("FAKE_HANG"):  # as a driver that never maps a block
            from dstack_lab.devices.parameter_map import ended_after

            with ended_after(1):
                time.sleep(60)
        why = os.environ.get("FAKE_UNSHARED")
        return told | ({"why_not_shared": why} if why and "DSTACK_LAB_PARAMETERS" in env else {})

    def set_threads(self, threads):
        pass

    def cap_memory(self, memory_mib):
        pass

    def fail(self):
        """As all clients do while the server is in FAULT, or the next one that finds memory full."""
        if Path(os.environ.get("FAKE_FAULT", "none")).exists():
            raise RuntimeError("CUDA error: MPS server is not ready to accept new clients")
        if (full := Path(os.environ.get("FAKE_FULL", "none"))).exists():
            full.unlink()
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def run(self, inputs):
        self.fail()
        time.sleep(0.002 if "FAKE_GREEN" not in os.environ else pace_s(self.options.model, len(inputs), self.granted / 1.32))
        return [[i, 0.0] for i in inputs]


module = types.ModuleType("dstack_lab.cuda_backend")
module.CudaBackend = FakeCuda
sys.modules["dstack_lab.cuda_backend"] = module

if "FAKE_GREEN" in os.environ:
    sys.path.append(str(Path(__file__).parent / "green"))
    from fake_cuda import Sleeper

    from dstack_lab.devices import green_backend

    class Paced(Sleeper):
        def run(self, inputs):
            self.path = "graph" if self.options.graphs and self.groups in self.homes else "eager"
            with self.hold():
                time.sleep(pace_s(self.options.model, len(inputs), self.ledger.context(self.groups).sms / 1.32))
            return [[i, 0.5] for i in inputs]

    green_backend.GreenBackend = Paced

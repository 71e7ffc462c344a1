"""A network inside Triton Inference Server: copied into a model repository, run by the server's Python backend.

The network, its inputs and the digest of its answer are those of `dstack_lab.worker`: only who forms the
batches differs. Numbers travel as DLPack, since the backend's own way to read arrays breaks with numpy 2.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

#: How long a server may take to end in good order [s].
PATIENCE_S = 20.0


def _guard(client: int, server: int, regions: str) -> None:
    """Wait for the end of the client or of the server; end the other one and this process, and free their memory."""
    waiting = select.poll()
    for pid in filter(None, (client, server)):
        try:
            waiting.register(os.pidfd_open(pid), select.POLLIN)
        except ProcessLookupError:
            break
    else:
        waiting.poll()
    end = time.monotonic() + PATIENCE_S
    if client and os.getppid() == server:
        os.kill(server, signal.SIGTERM)  # it then ends its models in good order, unless it is still loading them
    while client and os.getppid() == server:
        time.sleep(0.1)
        if time.monotonic() > end:
            os.kill(server, signal.SIGKILL)
    for left in Path("/dev/shm").glob(f"{regions}*") if regions else ():
        left.unlink(missing_ok=True)
    os._exit(1)


class TritonPythonModel:
    """What Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the network and warm its batches up."""
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # the server's Python ignores it
        client, server = int(os.environ.get("DSTACK_LAB_CLIENT", 0)), os.getppid()
        if client and server == 1:
            os._exit(1)  # the server was killed meanwhile
        regions = os.environ.get("DSTACK_LAB_REGIONS", "")
        threading.Thread(target=_guard, args=(client, server, regions), daemon=True).start()
        import torch
        import triton_python_backend_utils

        from dstack_lab.worker import BACKENDS, answer

        config = json.loads(args["model_config"])
        told = {key: value["string_value"] for key, value in config["parameters"].items()}
        whole = {key: int(told[key]) for key in ("pool", "seed", "threads")}
        self.torch: Any = torch
        self.server: Any = triton_python_backend_utils
        self.backend = BACKENDS[told["backend"]](argparse.Namespace(model=told["model"], weights=None, **whole))
        self.backend.load()
        most = config["max_batch_size"]
        said = answer(self.backend, {"op": "warm", "batches": sorted({*range(1, min(most, 16) + 1), most})})
        if said["reply"] == "error":
            raise RuntimeError(said["message"])
        self.batches = 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Serve what the server put together as one batch."""
        cpu, begin = time.process_time(), time.monotonic()
        asked = (self.server.get_input_tensor_by_name(request, "INPUT") for request in requests)
        outputs = self.backend.run([int(self.torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).item()) for tensor in asked])
        self.batches += 1
        service_ms, cpu_ms = (time.monotonic() - begin) * 1e3, (time.process_time() - cpu) * 1e3
        rows = self.torch.tensor(
            [[*pair, self.batches, len(requests), service_ms, cpu_ms] for pair in outputs], dtype=self.torch.float64
        )
        tensors = (self.server.Tensor.from_dlpack("ANSWER", row[None]) for row in rows)
        return [self.server.InferenceResponse([tensor]) for tensor in tensors]

    def finalize(self) -> None:
        """End at once: torch takes seconds to end in good order."""
        os._exit(0)

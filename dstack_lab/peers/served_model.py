"""A network inside Triton Inference Server: copied into a model repository, run by the server's Python backend.

The network, its inputs and the digest of its answer are those of `dstack_lab.worker`: only who forms the
batches differs. Numbers travel as DLPack, since the backend's own way to read arrays breaks with numpy 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from typing import Any


def _end_with(client: int, server: int) -> None:
    """End the server in good order, and so this process, when the client is gone."""
    with contextlib.suppress(ProcessLookupError):
        waiting = select.poll()
        waiting.register(os.pidfd_open(client), select.POLLIN)
        waiting.poll()
    os.kill(server, signal.SIGTERM)


class TritonPythonModel:
    """What Triton's Python backend asks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the network and warm its batches up."""
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # the server's Python ignores it
        import torch
        import triton_python_backend_utils

        from dstack_lab.worker import BACKENDS, answer, end_with_parent

        server = os.getppid()
        end_with_parent(server, by_signal=False)  # a killed server would leave this process behind
        if client := os.environ.get("DSTACK_LAB_CLIENT"):  # and a killed client the server
            threading.Thread(target=_end_with, args=(int(client), server), daemon=True).start()
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

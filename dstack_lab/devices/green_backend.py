"""What a tenant of green contexts does for a worker's messages: a network on the SMs it was lent."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from dstack_lab.devices.green_driver import torch_with_cuda
from dstack_lab.devices.green_graphs import GraphPool
from dstack_lab.devices.green_ledger import SmLedger
from dstack_lab.protocol import Message

#: Networks of this process: tenants of one network share its parameters.
_networks: dict[tuple[str, str | None, int, int, str, bool], Any] = {}

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class GreenBackend:
    """torch on a lease of a process that holds all tenants (see `dstack_lab.devices.green`).

    Parameters
    ----------
    options : argparse.Namespace
        ``device``, ``fine``, ``model``, ``weights``, ``seed``, ``pool``, ``batches``, ``precision``,
        ``channels_last``, and ``homes``:
        the groups to prepare graphs for, those it has without being told otherwise first.
    """

    kind = "cuda"

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.homes = [tuple(home) for home in options.homes]
        self.groups = self.homes[0]
        self.used_graph = False
        self.serving = False

    def load(self) -> Message:
        """Open the GPU, cut it, build the network, capture a graph for each batch and home.

        Raises
        ------
        ValueError
            If the network is unknown.
        GreenError
            If torch has no CUDA, or green contexts cannot be had here.
        """
        torch, options = torch_with_cuda(), self.options
        from dstack_lab import zoo

        self.torch, self.ledger, self.graphs = torch, SmLedger.of(options.device, options.fine), GraphPool(torch)
        self.place = f"{self.kind}:{options.device}"
        torch.cuda.set_device(options.device)  # of this thread
        key = (options.model, options.weights, options.seed, options.pool, options.precision, options.channels_last)
        if key not in _networks:
            network = zoo.load(options.model, weights=options.weights, device=self.place, seed=options.seed)
            dtype = getattr(torch, PRECISIONS[options.precision])
            form: dict[str, Any] = {"memory_format": torch.channels_last} if options.channels_last else {}
            rows = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in network.example(options.pool)]
            images = [options.channels_last and tensor.dim() == 4 for tensor in rows]
            # Stored by pixel, so that rows are gathered whole and the network still sees channels_last.
            stored = [(r.permute(0, 2, 3, 1) if image else r).contiguous() for r, image in zip(rows, images, strict=True)]
            _networks[key] = network.module.to(dtype=dtype, **form), stored, images
        self.module, self.pool, self.images = _networks[key]
        torch.cuda.synchronize(options.device)  # loaded on another stream
        for home in self.homes:
            for batch in options.batches:
                with torch.inference_mode():
                    inputs = self._gather(torch.arange(batch, device=self.place) % options.pool)
                self.graphs.capture((options.model, batch, home), self._digest, inputs, self.ledger.stream(home))
        granted = self.ledger.context(self.groups).sms
        return {"groups": self.ledger.groups, "granted_sms": granted, "sms": self.ledger.sms, "graphs": len(self.graphs)}

    def set_threads(self, threads: int) -> None:
        """Accept the request: the GPU's share does not depend on the CPU's threads."""

    def use(self, groups: Iterable[int]) -> None:
        """Compute on these groups from now on."""
        self.groups = tuple(sorted(groups))

    def hold(self) -> contextlib.AbstractContextManager[object]:
        """Hold the groups while a batch runs; while it loads, it shares them with whoever serves there.

        Raises
        ------
        ValueError
            If another tenant holds one of them.
        """
        return self.ledger.lease(groups=self.groups) if self.serving else contextlib.nullcontext()

    def facts(self) -> Message:
        """Facts about the last batch: SMs granted, and whether a graph was replayed."""
        return {"granted_sms": self.ledger.context(self.groups).sms, "path": "graph" if self.used_graph else "eager"}

    def run(self, inputs: Sequence[int]) -> list[list[float]]:
        """Gather the inputs, run the network on the leased SMs, digest its answer.

        A batch without a graph for these groups runs eagerly, on the same SMs.

        Raises
        ------
        ValueError
            If another tenant holds one of the groups.
        """
        torch, options = self.torch, self.options
        stream = self.ledger.stream(self.groups)
        with self.hold(), torch.inference_mode(), torch.cuda.stream(stream):
            rows = (torch.tensor(inputs) % options.pool).to(self.place, non_blocking=True)
            batch = self._gather(rows)
            captured = self.graphs.get((options.model, len(inputs), self.groups))
            self.used_graph = captured is not None
            digest = captured.replay(batch) if captured else self._digest(*batch)
            classes, scores = digest.cpu().tolist()  # waits for this stream only
        return [[int(c), s] for c, s in zip(classes, scores, strict=True)]

    def _gather(self, rows: Any) -> list[Any]:
        """Inputs of these numbers, as the network wants them."""
        found = [tensor.index_select(0, rows) for tensor in self.pool]
        return [tensor.permute(0, 3, 1, 2) if image else tensor for tensor, image in zip(found, self.images, strict=True)]

    def _digest(self, *inputs: Any) -> Any:
        """Run the network and return a row of classes and one of scores."""
        answer = self.module(*inputs)
        while not hasattr(answer, "argmax"):
            answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
        flat = answer.reshape(len(inputs[0]), -1)
        return self.torch.stack([flat.argmax(1).double(), flat.double().mean(1)])

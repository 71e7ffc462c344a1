"""What a tenant of green contexts does for a worker's messages: a network on the SMs it was lent."""

from __future__ import annotations

import argparse
import contextlib
import math
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
        ``channels_last``, ``graphs``, and ``homes``:
        the groups to prepare graphs for, those it has without being told otherwise first.
    """

    kind = "cuda"

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.homes = [tuple(home) for home in options.homes]
        self.groups = self.homes[0]
        self.path, self.gpu_ms = "", math.nan
        self.clock = True  #: the driver takes events on these streams
        self.serving = False
        self.buffers: dict[int, tuple[list[Any], Any]] = {}  # pinned inputs and answers, by batch

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
            network = zoo.load(options.model, weights=options.weights, device="cpu", seed=options.seed)
            dtype = getattr(torch, PRECISIONS[options.precision])
            form: dict[str, Any] = {"memory_format": torch.channels_last} if options.channels_last else {}
            rows = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in network.example(options.pool)]
            images = [options.channels_last and tensor.dim() == 4 for tensor in rows]
            # Stored by pixel, so that rows are gathered whole and the network still sees channels_last.
            stored = [(r.permute(0, 2, 3, 1) if image else r).contiguous() for r, image in zip(rows, images, strict=True)]
            _networks[key] = network.module.to(device=self.place, dtype=dtype, **form), stored, images
        self.module, self.pool, self.images = _networks[key]
        torch.cuda.synchronize(options.device)  # loaded on another stream
        self.events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        for home in self.homes if options.graphs else ():
            for batch in options.batches:
                with torch.inference_mode():
                    inputs = [tensor.to(self.place) for tensor in self._gather(range(batch))]
                self.graphs.capture((options.model, batch, home), self._digest, inputs, self.ledger.stream(home, capture=True))
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
        """Facts about the last batch: SMs granted, and how it was run."""
        return {"granted_sms": self.ledger.context(self.groups).sms, "path": self.path}

    def run(self, inputs: Sequence[int]) -> list[list[float]]:
        """Gather the inputs, run the network on the leased SMs, digest its answer.

        Inputs are gathered in pinned memory. A batch without a graph for these groups is filled up to the
        next one that has (`path` is then ``"padded"``); larger than all, it runs eagerly, on the same SMs.
        `gpu_ms` is the time from the copy of the inputs to that of the answer by the GPU's clock, NaN where
        the driver takes no events on the streams of green contexts.

        Raises
        ------
        ValueError
            If another tenant holds one of the groups.
        """
        torch, options, n = self.torch, self.options, len(inputs)
        stream = self.ledger.stream(self.groups)
        with self.hold(), torch.inference_mode(), torch.cuda.stream(stream):
            graphs = {b: g for b in options.batches if b >= n and (g := self.graphs.get((options.model, b, self.groups)))}
            size = min(graphs, default=n)
            self.path = "eager" if not graphs else "graph" if size == n else "padded"
            batch = self._gather([*inputs, *[inputs[-1]] * (size - n)])
            answer = self.buffers[size][1]
            self._mark(0, stream)
            if graphs:
                digest = graphs[size].replay(batch)
            else:
                digest = self._digest(*(tensor.to(self.place, non_blocking=True) for tensor in batch))
            answer.copy_(digest, non_blocking=True)
            self._mark(1, stream)
            stream.synchronize()  # of this stream only
            self.gpu_ms = self.events[0].elapsed_time(self.events[1]) if self.clock else math.nan
            classes, scores = answer.tolist()
        return [[int(c), s] for c, s in zip(classes, scores, strict=True)][:n]

    def _mark(self, which: int, stream: Any) -> None:
        """Put an event on a stream; where the driver refuses, do without the GPU's clock from then on."""
        if self.clock:
            try:
                self.events[which].record(stream)
            except RuntimeError:
                self.clock = False

    def _gather(self, numbers: Sequence[int]) -> list[Any]:
        """Inputs of these numbers in pinned memory, as the network wants them, until the next batch of this size."""
        torch, size = self.torch, len(numbers)
        if size not in self.buffers:
            pin = {"pin_memory": self.kind == "cuda"}
            rows = [torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, **pin) for tensor in self.pool]
            self.buffers[size] = rows, torch.empty((2, size), dtype=torch.float64, **pin)
        wanted, targets = torch.as_tensor(numbers) % self.options.pool, self.buffers[size][0]
        for source, target in zip(self.pool, targets, strict=True):
            torch.index_select(source, 0, wanted, out=target)
        return [tensor.permute(0, 3, 1, 2) if image else tensor for tensor, image in zip(targets, self.images, strict=True)]

    def _digest(self, *inputs: Any) -> Any:
        """Run the network and return a row of classes and one of scores."""
        answer = self.module(*inputs)
        while not hasattr(answer, "argmax"):
            answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
        flat = answer.reshape(len(inputs[0]), -1)
        return self.torch.stack([flat.argmax(1).double(), flat.double().mean(1)])

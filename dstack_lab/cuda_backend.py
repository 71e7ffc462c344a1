"""A worker's network on a GPU: ``python -m dstack_lab.worker --device cuda``.

What the GPU is shared by (the environment of NVIDIA MPS, say) is settled by the parent before this
process begins. torch is imported by `CudaBackend.load` only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstack_lab.checks import require
from dstack_lab.devices import nvml
from dstack_lab.devices.parameter_map import PARAMETERS_GONE, NotShared, gone, mapped
from dstack_lab.protocol import Message

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

#: ``CU_DEVICE_ATTRIBUTE_MPS_ENABLED``: whether this process computes under MPS.
MPS_ENABLED = 133

#: Runs before a capture: libraries choose their kernels and workspaces in the first ones.
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How a network is put on the GPU.

    Parameters
    ----------
    precision : {"fp16", "bf16", "fp32"}
        Of weights and of inputs that are not whole numbers.
    channels_last : bool
        Memory format of images and convolutions.
    graphs : bool
        One CUDA graph for each batch; eager otherwise.
    parameters : str
        Socket of the process that holds the parameters for all workers of a network; none if empty.
    """

    precision: str = "fp16"
    channels_last: bool = True
    graphs: bool = True
    parameters: str = ""

    def __post_init__(self) -> None:
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> CudaOptions:
        """Read what the device wrote into a worker's environment; the defaults otherwise.

        Raises
        ------
        ValueError
            If a value is unknown.
        """
        switches = {}
        for field in ("channels_last", "graphs"):
            name = f"DSTACK_LAB_{field.upper()}"
            require(environ.get(name, "1") in ("0", "1"), name, environ.get(name), "0 or 1")
            switches[field] = environ.get(name, "1") == "1"
        return cls(environ.get("DSTACK_LAB_PRECISION", "fp16"), **switches, parameters=environ.get("DSTACK_LAB_PARAMETERS", ""))


class CudaBackend:
    """torch on the part of a GPU that this process was given.

    Parameters
    ----------
    options : argparse.Namespace
        Of the worker's command line.
    cuda : CudaOptions, optional
        From the environment by default.
    """

    def __init__(self, options: argparse.Namespace, cuda: CudaOptions | None = None) -> None:
        self.options, self.cuda = options, cuda or CudaOptions.from_env()
        self.slots: dict[int, _Slot] = {}  # prepared, by batch
        self.eager: dict[int, _Slot] = {}  # those of batches that nobody prepared
        self.gpu_ms, self.path = float("nan"), ""
        self.lifeline: socket.socket | None = None  # to the process that holds the parameters

    def load(self) -> Message:
        """Open the GPU, build the network and put it there.

        Raises
        ------
        ValueError
            If the network is unknown.
        RuntimeError
            If torch has no CUDA, or the GPU cannot be opened; the sentence names the cure.
        """
        import torch

        from dstack_lab import zoo

        self.torch: Any = torch
        open_gpu(torch)
        self.set_threads(self.options.threads)
        self.place, self.stream = torch.device("cuda", 0), self.torch.cuda.Stream(0)
        self.dtype = getattr(torch, PRECISIONS[self.cuda.precision])
        self.module, make_example, whose = self._network(zoo.load)
        example = make_example(self.options.pool)
        self.images = [self.cuda.channels_last and tensor.dim() == 4 for tensor in example]
        self.pool = tuple(self._stored(tensor, image) for tensor, image in zip(example, self.images, strict=True))
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda.graphs else None
        torch.cuda.synchronize()  # loaded on another stream
        return facts(torch) | {
            "precision": self.cuda.precision,
            "channels_last": self.cuda.channels_last,
            "graphs": self.cuda.graphs,
            "team": [os.getpid()],
            **whose,
        }

    def _network(self, load: Callable[..., Any]) -> tuple[Any, Callable[[int], Any], Message]:
        """Return the module on the GPU, what makes inputs, and whose the parameters are: shared, or why not."""
        options, why = self.options, {}
        named: dict[str, Any] = {"weights": options.weights, "seed": options.seed}
        if self.cuda.parameters:
            network = load(options.model, device="cpu", hollow=True, **named)
            asked = {"model": options.model, **named, "dtype": PRECISIONS[self.cuda.precision]}
            try:
                self.lifeline = mapped(network.module, self.cuda.parameters, asked | {"channels_last": self.cuda.channels_last})
            except NotShared as error:
                why = {"why_not_shared": str(error)}
            else:
                return network.module, network.example, {"parameters": "shared"}
        network = load(options.model, device="cpu", **named)
        form: dict[str, Any] = {"memory_format": self.torch.channels_last} if self.cuda.channels_last else {}
        module = network.module.to(device=self.place, dtype=self.dtype, **form)
        return module, network.example, {"parameters": "own", **why}

    def set_threads(self, threads: int) -> None:
        """Use this many cores of the host; the GPU's share does not depend on them."""
        self.torch.set_num_threads(threads)

    def cap_memory(self, memory_mib: float) -> None:
        """Let this process allocate `memory_mib` MiB of the GPU's memory more than it has now."""
        cuda = self.torch.cuda
        total = cuda.get_device_properties(0).total_memory
        cuda.set_per_process_memory_fraction(min(1.0, (cuda.memory_reserved(0) + memory_mib * 2**20) / total), 0)

    def prepare(self, batch: int) -> None:
        """Make buffers for a batch and capture its graph; takes long, and is never done on a request's way."""
        if batch not in self.slots:
            with self.torch.inference_mode(), self.torch.cuda.stream(self.stream):
                self.slots[batch] = _Slot(self, batch, self.cuda.graphs)

    def run(self, inputs: Sequence[int]) -> list[list[float]]:
        """Gather the inputs in pinned memory, run the network, read its answer.

        A batch that was not prepared is filled up to the next one that was (`path` is then
        ``"padded"``); larger than all, it runs eagerly. `gpu_ms` is the time on the GPU, from the
        copy of the inputs to that of the answer.

        Raises
        ------
        RuntimeError
            If the parameters are gone with the process that held them: what was computed is not to be trusted.
        """
        torch = self.torch
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            n = len(inputs)
            size = min((batch for batch in self.slots if batch >= n), default=n) if self.cuda.graphs else n
            if size not in self.slots and n not in self.eager:
                self.eager[n] = _Slot(self, n, graph=False)
            slot = self.slots[size] if size in self.slots else self.eager[n]
            self.path = "eager" if slot.graph is None else "graph" if size == n else "padded"
            wanted = [*inputs, *[inputs[-1]] * (slot.batch - len(inputs))]
            rows = torch.tensor(wanted) % self.options.pool
            for source, target in zip(self.pool, slot.host, strict=True):
                torch.index_select(source, 0, rows, out=target)
            slot.begin.record(self.stream)
            slot.compute()
            slot.end.record(self.stream)
            self.stream.synchronize()  # of this stream only
            self.gpu_ms = slot.begin.elapsed_time(slot.end)
            if self.lifeline is not None and gone(self.lifeline):
                raise RuntimeError(PARAMETERS_GONE)
            pairs = zip(slot.classes.tolist(), slot.scores.tolist(), strict=True)
            return [[c, s] for c, s in pairs][: len(inputs)]

    def digest(self, *inputs: Any) -> tuple[Any, Any]:
        """Run the network; return the position of the largest output of each input, and the mean of all."""
        answer = self.module(*inputs)
        while not hasattr(answer, "argmax"):
            answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
        flat = answer.reshape(len(inputs[0]), -1)
        return flat.argmax(1), flat.float().mean(1)

    def _stored(self, tensor: Any, image: bool) -> Any:
        """Rows as they are gathered and copied: contiguous, so that each copy is one; images by pixel."""
        tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return (tensor.permute(0, 2, 3, 1) if image else tensor).contiguous()

    def views(self, stored: Sequence[Any]) -> list[Any]:
        """Those rows as the network wants them; images are then in memory format channels_last."""
        return [tensor.permute(0, 3, 1, 2) if image else tensor for tensor, image in zip(stored, self.images, strict=True)]


class _Slot:
    """Buffers, events and graph of one batch. Batches take turns, so their graphs share memory."""

    def __init__(self, backend: CudaBackend, batch: int, graph: bool) -> None:
        torch = backend.torch
        self.backend, self.batch, self.graph = backend, batch, None
        shapes = [((batch, *tensor.shape[1:]), tensor.dtype) for tensor in backend.pool]
        self.host = [torch.empty(shape, dtype=dtype, pin_memory=True) for shape, dtype in shapes]
        self.inputs = [torch.empty(shape, dtype=dtype, device=backend.place) for shape, dtype in shapes]
        self.views = backend.views(self.inputs)
        rows = torch.arange(batch) % backend.options.pool  # a batch may be larger than the pool
        for source, host, target in zip(backend.pool, self.host, self.inputs, strict=True):
            torch.index_select(source, 0, rows, out=host)  # real inputs: token numbers out of range would fault the GPU
            target.copy_(host)
        self.classes = torch.empty(batch, dtype=torch.int64, pin_memory=True)
        self.scores = torch.empty(batch, dtype=torch.float32, pin_memory=True)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not graph:
            return
        for _ in range(WARM_UPS):  # on the stream that captures
            backend.digest(*self.views)
        backend.stream.synchronize()
        captured = torch.cuda.CUDAGraph()
        try:
            capture = {"stream": backend.stream, "pool": backend.graph_pool, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(captured, **capture):
                self.answer = backend.digest(*self.views)
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            raise RuntimeError(
                f"the network cannot be captured in a CUDA graph: pass graphs=False to run eagerly ({error})"
            ) from error
        self.graph = captured

    def compute(self) -> None:
        """Queue copy, network and copy on the current stream."""
        for source, target in zip(self.host, self.inputs, strict=True):
            target.copy_(source, non_blocking=True)
        if self.graph is None:
            self.answer = self.backend.digest(*self.views)
        else:
            self.graph.replay()
        self.classes.copy_(self.answer[0], non_blocking=True)
        self.scores.copy_(self.answer[1], non_blocking=True)


def open_gpu(torch: Any) -> None:
    """Start CUDA.

    Raises
    ------
    RuntimeError
        With the cure.
    """
    if torch.version.cuda is None:
        cure = "install a CUDA build, see https://pytorch.org/get-started/locally"
        raise RuntimeError(f"torch {torch.__version__} was built without CUDA: {cure}")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"CUDA does not start: {error}") from error
    if torch.cuda.device_count() == 0:
        raise RuntimeError("CUDA shows no GPU: unset CUDA_VISIBLE_DEVICES, or start the container with --gpus all")


def under_mps(libcuda: str = "libcuda.so.1") -> bool:
    """Whether this process, whose CUDA has started, computes under MPS."""
    value = ctypes.c_int()
    try:
        failed = ctypes.CDLL(libcuda).cuDeviceGetAttribute(ctypes.byref(value), MPS_ENABLED, 0)
    except (OSError, AttributeError):
        return False
    return not failed and value.value == 1


def facts(torch: Any) -> Message:
    """What a ``ready`` message says about the GPU: under MPS the number of SMs is that of the share."""
    seen = torch.cuda.get_device_properties(0)
    uuid = str(getattr(seen, "uuid", ""))
    found: Message = {"device": seen.name, "granted_sms": seen.multi_processor_count, "mps": under_mps()}
    found |= {"memory_mib": seen.total_memory / 2**20, "cuda": torch.version.cuda}
    try:
        found["driver"] = nvml.versions()[0]
        gpu = next((gpu for gpu in nvml.gpus({}) if uuid and uuid in gpu.uuid), None)
    except nvml.NoDriver:
        gpu = None
    if gpu is not None:
        found |= {"all_sms": gpu.sms, "clock_mhz": gpu.clock_mhz, "power_w": gpu.power_w, "throttled": list(gpu.throttled)}
    return found

"""One process, one network, one share: ``python -m dstack_lab.worker --model NAME ...``.

Started by the devices; speaks `dstack_lab.protocol` on its standard input and output. Cores and
thread counts are given by the parent before this process begins: only what is set before torch
is imported holds for all of its threads.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dstack_lab.checks import count, non_negative, require
from dstack_lab.devices.spawn import spread, threads_of
from dstack_lab.protocol import OPS, Lines, Message, encode
from dstack_lab.provenance import versions_here

PR_SET_PDEATHSIG = 1
GRACE_S = 10.0  #: for the batch that a GPU runs when the parent ends
ROUGH_EDGES = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory")


class Backend(Protocol):
    """What a kind of device does for a worker."""

    def load(self) -> Message:
        """Build the network and its inputs; return facts about the device."""

    def set_threads(self, threads: int) -> None:
        """Use this many cores from now on."""

    def cap_memory(self, memory_mib: float) -> None:
        """Allow this many MiB more than are allocated now."""

    def run(self, inputs: Sequence[int]) -> list[list[float]]:
        """Serve one batch and wait for its end; return ``[class, score]`` for each input."""


class CpuBackend:
    """torch on the cores this process was given."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.threads = 0
        self.team = [os.getpid()]  # the threads that compute: this one and torch's pool

    def load(self) -> Message:
        """Import torch and build the network.

        Raises
        ------
        ValueError
            If the network is unknown.
        """
        import torch

        from dstack_lab import zoo

        torch.set_num_interop_threads(1)  # only allowed before the first parallel work
        self.torch = torch
        self.set_threads(self.options.threads)
        network = zoo.load(self.options.model, weights=self.options.weights, device="cpu", seed=self.options.seed)
        self.module = network.module
        self.pool = network.example(self.options.pool)
        self.run([0])  # makes the threads and workspaces that a memory cap is not meant to count
        return {"team": self.team}

    def set_threads(self, threads: int) -> None:
        """Use `threads` threads, each on a core of its own."""
        if threads == self.threads:
            return
        self.torch.set_num_threads(threads)
        self.threads = threads
        if threads > len(self.team):
            me = os.getpid()
            cores = sorted(set().union(*map(os.sched_getaffinity, self.team)))
            os.sched_setaffinity(0, cores)  # new threads begin on the cores of their maker
            before = threads_of(me)
            self.torch.zeros(threads << 16).neg_()  # large enough to make all of them now
            self.team += sorted(threads_of(me) - before)
            spread(me, self.team, cores)

    def cap_memory(self, memory_mib: float) -> None:
        """Let this process allocate `memory_mib` MiB more than it has now."""
        with open("/proc/self/statm", encoding="ascii") as source:
            now = int(source.read().split()[0]) * resource.getpagesize()
        limit = now + int(memory_mib * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def run(self, inputs: Sequence[int]) -> list[list[float]]:
        """Gather the inputs, run the network, digest its answer."""
        torch = self.torch
        with torch.inference_mode():
            rows = torch.tensor(inputs) % self.options.pool
            answer = _first_tensor(self.module(*(tensor.index_select(0, rows) for tensor in self.pool)))
            flat = answer.reshape(len(inputs), -1)
            classes, scores = flat.argmax(1).tolist(), flat.double().mean(1).tolist()
        return [[c, s] for c, s in zip(classes, scores, strict=True)]


def _cuda_backend(options: argparse.Namespace) -> Backend:
    from dstack_lab.cuda_backend import CudaBackend

    return CudaBackend(options)


BACKENDS: dict[str, Callable[[argparse.Namespace], Backend]] = {"cpu": CpuBackend, "cuda": _cuda_backend}


def answer(backend: Backend, message: Message) -> Message:
    """Do what `message` asks and return the reply, which is an ``error`` if it could not be done."""
    try:
        op = message.get("op")
        require(op in OPS, "op", op, f"one of {', '.join(OPS)}")
        if "threads" in message:
            backend.set_threads(count("threads", message["threads"]))
        reply = {"warm": _warm, "time": _time, "run": _run}[str(op)](backend, message)
    except Exception as error:  # a worker survives whatever one request does to it
        reply = {"reply": "error", **describe(error)}
    return {**reply, "id": message["id"]} if "id" in message else reply


def describe(error: Exception) -> Message:
    """Return kind and sentence of `error` as the protocol has them."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(edge in text.lower() for edge in ROUGH_EDGES):
        return {"error": "out_of_memory", "message": text}
    if isinstance(error, ValueError):
        return {"error": "bad_input", "message": str(error)}
    return {"error": "failed", "message": text}


def _serve(backend: Backend, inputs: Sequence[int]) -> list[list[float]]:
    try:
        return backend.run(inputs)
    except ValueError as error:  # the network's, not the request's
        raise RuntimeError(f"the network raised ValueError: {error}") from error


def _warm(backend: Backend, message: Message) -> Message:
    batches: Any = message.get("batches")
    repeats = count("repeats", message.get("repeats", 2))
    require(isinstance(batches, list), "batches", batches, "a list of batches")
    begin = time.perf_counter()
    for batch in [count("batch", b) for b in batches]:
        if hasattr(backend, "prepare"):
            backend.prepare(batch)
        for _ in range(repeats):
            _serve(backend, range(batch))
    return {"reply": "warm", "wall_ms": (time.perf_counter() - begin) * 1e3}


def _time(backend: Backend, message: Message) -> Message:
    batch, repeats = count("batch", message.get("batch")), count("repeats", message.get("repeats"))
    min_ms = non_negative("min_ms", message.get("min_ms", 0))
    max_ms = non_negative("max_ms", message.get("max_ms", 3.6e6))
    samples_ms: list[float] = []
    gpu_ms: list[float] = []
    cpu, begin = time.process_time(), time.perf_counter()
    before = begin
    while True:
        first = len(samples_ms) * batch  # another batch each time, as real requests would be
        _serve(backend, range(first, first + batch))
        now = time.perf_counter()
        samples_ms.append((now - before) * 1e3)
        gpu_ms += _gpu_ms(backend).values()
        before, wall_ms = now, (now - begin) * 1e3
        if wall_ms >= max_ms or (len(samples_ms) >= repeats and wall_ms >= min_ms):
            cpu_ms = (time.process_time() - cpu) * 1e3
            reply = {"reply": "time", "samples_ms": samples_ms, "cpu_ms": cpu_ms, "wall_ms": wall_ms}
            return {**reply, "gpu_ms": gpu_ms} if gpu_ms else reply


def _run(backend: Backend, message: Message) -> Message:
    inputs: Any = message.get("inputs")
    require(isinstance(inputs, list) and len(inputs) > 0, "inputs", inputs, "a list of 1 or more numbers of inputs")
    for i in inputs:
        count("input", i, least=0)
    cpu, begin = time.process_time(), time.monotonic()
    outputs = _serve(backend, inputs)
    service_ms = (time.monotonic() - begin) * 1e3
    cpu_ms = (time.process_time() - cpu) * 1e3
    reply = {"reply": "run", "outputs": outputs, "service_ms": service_ms, "cpu_ms": cpu_ms, "start_ms": begin * 1e3}
    return {**reply, **_gpu_ms(backend), **({"path": backend.path} if hasattr(backend, "path") else {})}


def _gpu_ms(backend: Backend) -> dict[str, float]:
    """Time of the last batch on the GPU's own clock, where there is one and it can be read."""
    gpu_ms = getattr(backend, "gpu_ms", math.nan)
    return {} if math.isnan(gpu_ms) else {"gpu_ms": gpu_ms}


def _first_tensor(answer: Any) -> Any:
    while not hasattr(answer, "argmax"):
        answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
    return answer


def end_with_parent(parent: int, by_signal: bool, grace_s: float = 0.0) -> None:
    """Arrange that this process does not outlive `parent`, however that one ends.

    The kernel's parent-death signal also reaches a stopped or busy worker, but is bound to the
    parent's *thread*: a worker started from a passing thread would die with that thread. Then a
    thread here waits for the parent's end instead. In both cases the end of the standard input
    is the second rope. The thread lets `grace_s` seconds pass for that one to do.
    """
    if by_signal:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_end_after, args=(parent, grace_s), daemon=True).start()
    if os.getppid() != parent:  # it was gone before the arrangement was made
        os._exit(1)


def _end_after(parent: int, grace_s: float) -> None:
    with contextlib.suppress(OSError):  # not every sandbox has pidfds
        waiting = select.poll()
        waiting.register(os.pidfd_open(parent), select.POLLIN)
        waiting.poll()
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(grace_s)
    os._exit(1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m dstack_lab.worker", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True, help="a name of dstack_lab.zoo, or one's own network")
    parser.add_argument("--weights", help="'DEFAULT' for trained weights; random ones otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", default="", help="batches to warm up before saying ready, as 1,2,4")
    parser.add_argument("--pool", type=int, default=64, help="number of different example inputs")
    parser.add_argument("--memory-mib", type=float, help="MiB that serving may allocate beyond the loaded network")
    parser.add_argument("--parent", type=int, help="process to end with")
    parser.add_argument("--parent-signal", action="store_true", help="end by the kernel's parent-death signal")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, say ready, answer requests until ``stop`` or the end of the input."""
    options = parse(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    if options.parent:
        # A GPU's worker ends with its input, after its batch: killed in the middle, it may wedge the MPS server.
        on_gpu = options.device != "cpu"
        end_with_parent(options.parent, options.parent_signal and not on_gpu, GRACE_S if on_gpu else 0)
    out = os.dup(1)  # whatever a library prints goes to standard error, not among the messages
    os.dup2(2, 1)
    begin, cores = time.perf_counter(), sorted(os.sched_getaffinity(0))
    backend = BACKENDS[options.device](options)
    try:
        facts = backend.load()
        if options.memory_mib:
            backend.cap_memory(options.memory_mib)
        batches = [int(b) for b in options.batches.split(",") if b]
        if batches:
            _warm(backend, {"batches": batches})
    except Exception as error:
        _send(out, {"reply": "failed", **describe(error)})
        return 1
    ready: Message = {"reply": "ready", "pid": os.getpid(), "threads": options.threads, "facts": facts}
    ready |= {"cores": cores, "versions": versions_here("torch", "torchvision")}
    _send(out, ready | {"load_ms": (time.perf_counter() - begin) * 1e3})
    gc.freeze()  # the 300,000 objects of torch are here to stay: a collection that visits them takes a tenth of a second
    lines = Lines()
    while data := os.read(0, 65536):
        for message in lines.feed(data):
            if message.get("op") == "stop":
                return 0
            _send(out, answer(backend, message))
    return 0


def _send(out: int, message: Message) -> None:
    data = encode(message)
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    # Not sys.exit: torch's threads and a network of one's own may hold up an orderly end.
    status = main()
    sys.stderr.flush()
    os._exit(status)

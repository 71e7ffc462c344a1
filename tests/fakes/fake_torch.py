"""torch with a pretended GPU: tensors stay on the CPU, streams and graphs keep a diary of what was asked."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch as real


class FakeTorch:
    """Everything of torch, but for ``cuda``, ``device``, ``empty`` and ``version``."""

    __version__ = "2.11.0+fake"

    def __init__(self, sms=66, gpus=1, built_for="13.0"):
        self.version = SimpleNamespace(cuda=built_for)
        self.diary = []
        self.cuda = Cuda(self.diary, sms, gpus)

    def __getattr__(self, name):
        return getattr(real, name)

    def device(self, *place):
        return real.device("meta" if place == ("meta",) else "cpu")

    def set_num_threads(self, threads):
        self.diary.append(f"threads {threads}")

    def empty(self, *shape, pin_memory=False, **options):
        if pin_memory:
            self.diary.append("pinned")
        return real.empty(*shape, **options)


class Cuda:
    """The part of ``torch.cuda`` that a worker uses."""

    def __init__(self, diary, sms, gpus):
        self.diary, self.sms, self.gpus, self.error, self.capture_error = diary, sms, gpus, None, None
        self.on = None

    def init(self):
        if self.error:
            raise RuntimeError(self.error)

    def device_count(self):
        return self.gpus

    def is_available(self):
        return False  # for the rest of torch

    def get_device_properties(self, index):
        return SimpleNamespace(name="NVIDIA H200", multi_processor_count=self.sms, total_memory=1000 << 20, uuid="aaaa")

    def Stream(self, index):
        return Stream(self.diary)

    @contextmanager
    def stream(self, stream):
        self.on, before = stream, self.on
        try:
            yield
        finally:
            self.on = before

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self.diary)

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        return Graph(self.diary)

    @contextmanager
    def graph(self, graph, stream, pool, capture_error_mode):
        assert self.on is stream, "captured on another stream than it was warmed up on: the share would not hold"
        self.diary.append(f"capture {pool} {capture_error_mode}")
        yield
        if self.capture_error:
            raise RuntimeError(self.capture_error)

    def synchronize(self):
        self.diary.append("synchronize device")

    def memory_reserved(self, index):
        return 100 << 20

    def set_per_process_memory_fraction(self, fraction, index):
        self.diary.append(f"fraction {fraction:g}")


class Stream:
    def __init__(self, diary):
        self.diary = diary

    def synchronize(self):
        self.diary.append("synchronize stream")


class Event:
    def __init__(self, diary):
        self.diary = diary

    def record(self, stream):
        assert isinstance(stream, Stream)
        self.diary.append("event")

    def elapsed_time(self, end):
        return 1.5


class Graph:
    def __init__(self, diary):
        self.diary = diary

    def replay(self):
        self.diary.append("replay")

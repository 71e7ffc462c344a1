"""Stands for a Triton server: its gRPC service, and a batcher as its documentation describes it. No network is run."""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serve a model repository. `before` may hold up, fail or end a batch: it is called with its inputs."""

    def __init__(self, repository: Path, service_ms: float = 1.0, before=lambda inputs: None, ready: bool = True) -> None:
        self.service_ms, self.before, self.ready = service_ms, before, ready
        self.configs = {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}
        self.received = 0
        self._queues = {name: deque() for name in self.configs}
        self._news, self._stop = threading.Condition(), False
        self._server = grpc.server(ThreadPoolExecutor(256))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._threads = [threading.Thread(target=self._serve, args=(name,), daemon=True) for name in self.configs]

    def __enter__(self):
        self._server.start()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self._stop = True
        with self._news:
            self._news.notify_all()
        self._server.stop(0).wait()

    def _serve(self, name):
        batches = 0
        while not self._stop:
            with self._news:
                self._news.wait_for(lambda: self._queues[name] or self._stop)
                most = min(len(self._queues[name]), self.configs[name].max_batch_size)
                batch = [self._queues[name].popleft() for _ in range(most)]
            begin, failed = time.monotonic(), ""
            try:
                self.before([number for number, *_ in batch])
            except ValueError as error:
                failed = str(error)
            time.sleep(self.service_ms / 1e3)
            batches += 1
            took_ms = (time.monotonic() - begin) * 1e3
            for number, slot, done in batch:
                slot.append(failed or [number % 10, number / 7, batches, len(batch), took_ms, took_ms / 2])
                done.set()

    def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in self.configs)

    def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="triton", version="0.0.1")

    def ModelConfig(self, request, context):
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelInfer(self, request, context):
        (number,) = struct.unpack("<q", request.raw_input_contents[0])
        slot, done = [], threading.Event()
        with self._news:
            self.received += 1
            self._queues[request.model_name].append((number, slot, done))
            self._news.notify_all()
        while not done.wait(0.05):
            if self._stop:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the end")
        if isinstance(slot[0], str):
            context.abort(grpc.StatusCode.INTERNAL, slot[0])
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name="ANSWER", datatype="FP64", shape=[1, len(slot[0])])
        answer.raw_output_contents.append(struct.pack(f"<{len(slot[0])}d", *slot[0]))
        return answer


def read_config(path: Path):
    """What the server would read: the text in the server's own schema."""
    return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())

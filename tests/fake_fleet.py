"""A device without hardware: workers are threads' timers behind a socket, and every deed is written down."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from pathlib import Path

from dstack_lab.devices.base import WorkerDied
from dstack_lab.protocol import Lines, encode


class FakeDevice:
    """Shares in steps of 10 %; a batch takes `serve_ms`, a start `load_ms`, a kill `kill_ms`."""

    name = mechanism = "fake"

    def __init__(self, serve_ms=2.0, load_ms=1.0, kill_ms=0.0, most=None, poison=None):
        self.serve_ms, self.load_ms, self.kill_ms, self.log, self.live, self.peak = serve_ms, load_ms, kill_ms, [], set(), 0
        self.numbers, self.main = itertools.count(1), threading.get_ident()
        self.fault, self.poison = None, poison  # number of a request of "a" that no device survives
        self.refuse = 0  # starts to refuse
        if most:
            self.most_workers = lambda: most

    def shares(self):
        return tuple(range(10, 101, 10))

    def describe(self):
        return "fake"

    def marks(self):
        return ()

    def leases(self):
        return Leases()

    def common_fault(self, said=""):
        return "the server failed" if said == "poison" else self.fault

    def recover(self):
        assert not self.live, "the device began anew under living workers"
        self.log.append("recover")
        self.fault = None

    def serve(self, worker, inputs):
        """How long a worker takes for these requests [ms] (None: for ever), and what it complains of then."""
        return self.serve_ms, "poison" if worker.model == "a" and self.poison in inputs else None

    def start(self, model, gpu_pct, cores=None, **options):
        first = threading.get_ident() == self.main
        if self.refuse and not first:
            self.refuse -= 1
            raise RuntimeError("no worker today")
        self.log.append(f"start {model} {gpu_pct:g}")
        return FakeWorker(self, model, gpu_pct, 0.0 if first else self.load_ms)


class Leases:
    """As `SmLeases`, in percent."""

    def __init__(self):
        self.held = {}

    def take(self, worker):
        assert worker not in self.held
        self.held[worker] = worker.gpu_pct
        assert sum(self.held.values()) <= 100.05

    def give(self, worker):
        self.held.pop(worker, None)


class FakeWorker:
    """Answers after a while; request i is answered by class i."""

    def __init__(self, device, model, gpu_pct, load_ms):
        self.device, self.model, self.gpu_pct, self.pid = device, model, gpu_pct, next(device.numbers)
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.lines, self.alive, self.lock = Lines(), True, threading.Lock()
        device.live.add(self)
        device.peak = max(device.peak, len(device.live))
        self.later(load_ms, {"reply": "ready", "pid": self.pid, "facts": {}})

    def later(self, ms, message):
        def tell():
            with self.lock:
                if self.alive:
                    self.theirs.send(encode(message))

        timer = threading.Timer(ms / 1e3, tell)
        timer.daemon = True
        timer.start()

    def fileno(self):
        return self.ours.fileno()

    def send(self, message):
        if message["op"] == "run":
            self.device.log.append(f"run {self.model} {self.gpu_pct:g}")
            ms, wrong = self.device.serve(self, message["inputs"])
            answers = [[i, 0.5] for i in message["inputs"]]
            reply = {"reply": "run", "id": message["id"], "outputs": answers, "service_ms": ms}
            if wrong:
                reply = {"reply": "error", "id": message["id"], "error": "failed", "message": wrong}
            if ms is not None:
                self.later(ms, reply)

    def poll(self):
        try:
            data = self.ours.recv(65536)
        except BlockingIOError:
            return []
        if not data:
            raise WorkerDied(f"fake worker of {self.model} died")
        return list(self.lines.feed(data))

    def wait_ready(self, timeout_s=10):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := self.poll():
                return found[0]
            time.sleep(0.001)
        raise AssertionError

    def die(self):
        """As by SIGKILL."""
        with self.lock:
            self.alive = False
            self.theirs.shutdown(socket.SHUT_RDWR)

    def kill(self):
        assert threading.get_ident() != self.device.main or not self.device.kill_ms, "the loop waits for a kill"
        time.sleep(self.device.kill_ms / 1e3)
        self.close("kill")

    def close(self, how="close"):
        with self.lock:
            if self in self.device.live:
                self.device.live.discard(self)
                self.device.log.append(f"{how} {self.model} {self.gpu_pct:g}")
                self.alive = False
                self.ours.close()
                self.theirs.close()


def open_files():
    """Number of descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))

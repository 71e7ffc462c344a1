"""An open-loop client: requests leave at the times drawn for them, whatever the server does."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import require
from dstack_lab.peers.server import ServerError
from dstack_lab.state import NS_PER_MS

#: Longest sleep [s], so that a dead server is noticed.
NAP_S = 0.25
#: How long one question about the server's state may take [s].
ASK_S = 5.0


class Client:
    """Talks gRPC to a Triton server: all requests share one connection, so that their number is no limit.

    Parameters
    ----------
    url : str
        ``host:port`` of the server's gRPC service, 8001 by its default.
    check : callable
        Raises if the server is known to have ended.

    Raises
    ------
    ValueError
        If tritonclient is not installed.
    """

    def __init__(self, url: str, check: Callable[[], None] = lambda: None) -> None:
        try:
            import tritonclient.grpc as grpc
            from tritonclient.utils import InferenceServerException
        except ImportError as error:
            raise ValueError(f"a Triton server is spoken to with tritonclient ({error}); install dstack-lab[triton]") from error
        host, _, port = url.rpartition(":")
        require(
            bool(host) and port.isdigit() and "/" not in url,
            "url",
            url,
            "host:port of a server's gRPC service, such as localhost:8001",
        )
        self.url, self.check, self.grpc, self.Failed = url, check, grpc, InferenceServerException
        self.raw = grpc.InferenceServerClient(url)

    def wait_ready(self, models: Sequence[str], timeout_s: float, live_s: float | None = None) -> str:
        """Wait until the server and all models are ready; return the server's version.

        Raises
        ------
        ServerError
            If it ended, or is not ready in `timeout_s` seconds, or not even live in `live_s`.
        ValueError
            If it is ready, but has not got a model.
        """
        begin, live, ready = time.monotonic(), False, False
        while not ready:
            self.check()
            with contextlib.suppress(self.Failed):
                live = live or self.raw.is_server_live(client_timeout=ASK_S)
                ready = live and self.raw.is_server_ready(client_timeout=ASK_S)
            waited_s = time.monotonic() - begin
            if not live and live_s is not None and waited_s > live_s:
                raise ServerError(f"no Triton server answers at {self.url}: start one, or check host and gRPC port")
            if not ready and waited_s > timeout_s:
                raise ServerError(f"the Triton server at {self.url} was not ready after {timeout_s:g} s")
            if not ready:
                time.sleep(0.1)
        for model in models:
            if not self.raw.is_model_ready(model, client_timeout=ASK_S):
                raise ValueError(f"the Triton server at {self.url} does not serve {model!r}: give it what write_repository wrote")
        return str(self.raw.get_server_metadata(client_timeout=ASK_S).version)

    def told(self, model: str) -> dict[str, Any]:
        """What the server was told about a model, as `repository.settings` has it."""
        config = self.raw.get_model_config(model, client_timeout=ASK_S).config
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        delay_us = config.dynamic_batching.max_queue_delay_microseconds if config.HasField("dynamic_batching") else -1
        return {"max_batch": config.max_batch_size, "delay_us": delay_us, "parameters": parameters}

    def drive(
        self, models: Sequence[str], arrivals_ms: Sequence[NDArray[np.float64]], drain_ms: float, tick: Callable[[float], None]
    ) -> Sent:
        """Send every request when it is due, and wait for the answers, at most `drain_ms` after the last.

        Parameters
        ----------
        models : sequence of str
        arrivals_ms : sequence of numpy.ndarray
            Sorted times of each model's requests [ms].
        drain_ms : float
        tick : callable
            Told the time [ms] some times a second.

        Returns
        -------
        Sent
            Its ``error`` is that of a server which ended in the middle.
        """
        which = np.repeat(np.arange(len(models)), [len(times) for times in arrivals_ms])
        index = np.concatenate([np.arange(len(times)) for times in arrivals_ms])
        due_ns = np.rint(np.concatenate(arrivals_ms) * NS_PER_MS).astype(np.int64)
        order = np.argsort(due_ns, kind="stable")
        sent = Sent(due_ns)
        inputs = [self._input(number) for number in range(max(map(len, arrivals_ms), default=0))]
        calls = []
        gc.disable()  # a collection stops the client for tens of milliseconds
        try:
            sent.start_ns = start = time.monotonic_ns()
            for k in order.tolist():
                while (ahead_ns := due_ns[k] - (now := time.monotonic_ns() - start)) > 0:
                    self._look(sent, now, tick)
                    time.sleep(min(ahead_ns * 1e-9, NAP_S))
                sent.sent_ns[k] = now
                calls.append(self.raw.async_infer(models[which[k]], inputs[index[k]], partial(sent.take, k)))
                self._look(sent, now, tick)
            last = int(due_ns.max(initial=0))
            while sent.open and (now := time.monotonic_ns() - start) <= last + drain_ms * NS_PER_MS:
                time.sleep(0.01)
                self._look(sent, now, tick)
        except ServerError as error:
            sent.error = error
        finally:
            gc.enable()
            sent.closed, sent.ended_ns = True, time.monotonic_ns() - sent.start_ns
            for call in calls:
                call.cancel()  # those without an answer; the others do not mind
        return sent

    def _input(self, number: int) -> list[Any]:
        tensor = self.grpc.InferInput("INPUT", [1, 1], "INT64")
        tensor.set_data_from_numpy(np.array([[number]], dtype=np.int64))
        return [tensor]

    def _look(self, sent: Sent, now_ns: int, tick: Callable[[float], None]) -> None:
        """Make sure, some times a second, that the server is there."""
        if now_ns - sent.looked_ns < NAP_S * 1e9:
            return
        sent.looked_ns = now_ns
        self.check()
        if sent.unavailable:
            sent.unavailable = False
            try:
                self.raw.is_server_live(client_timeout=ASK_S)
            except self.Failed as error:
                self.check()
                raise ServerError(f"the Triton server at {self.url} is gone ({error.message()})") from error
        tick(now_ns / NS_PER_MS)

    def close(self) -> None:
        """Close the connection."""
        self.raw.close()


class Sent:
    """What became of the requests of one run, in their order by service and arrival. Times in ns since the start."""

    def __init__(self, due_ns: NDArray[np.int64]) -> None:
        requests, self.due_ns = len(due_ns), due_ns
        self.start_ns = self.looked_ns = self.ended_ns = 0
        self.sent_ns = np.full(requests, -1, dtype=np.int64)
        self.finish_ns = np.full(requests, -1, dtype=np.int64)
        self.answers: list[Any] = [None] * requests  # of tritonclient; read after the run, not during it
        self.errors: dict[int, str] = {}
        self.unavailable, self.closed = False, False
        self.error: ServerError | None = None
        self._done: list[int] = []

    @property
    def open(self) -> int:
        """Requests without an answer, those yet to be sent too."""
        return len(self.answers) - len(self._done)

    def take(self, k: int, result: Any, error: Any) -> None:
        """Keep an answer; called from a thread of gRPC's."""
        now_ns = time.monotonic_ns() - self.start_ns
        if self.closed:
            return
        self.finish_ns[k] = now_ns
        if error is None:
            self.answers[k] = result
        else:
            self.errors[k] = str(error.message())
            self.unavailable = self.unavailable or "UNAVAILABLE" in str(error.status())
        self._done.append(k)

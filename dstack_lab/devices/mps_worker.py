"""A worker under MPS: checked when it is ready, let go of by the server before it is killed."""

from __future__ import annotations

import functools
import math
import signal
import subprocess
import weakref
from typing import Any

from dstack_lab.devices.base import WorkerDied
from dstack_lab.devices.cuda_errors import with_cure
from dstack_lab.devices.mps_daemon import MpsDaemon
from dstack_lab.devices.parameter_map import MAP_S
from dstack_lab.devices.process import WorkerProcess
from dstack_lab.devices.spawn import end
from dstack_lab.protocol import Message


def clients(daemon: MpsDaemon) -> list[MpsWorker]:
    """Workers under `daemon` that have not ended."""
    return [worker for worker in list(_ALL) if worker.daemon is daemon and worker.alive]


class MpsWorker(WorkerProcess):
    """A worker under MPS. It is refused, as ``failed``, unless it is capped at its share's SMs.

    Parameters
    ----------
    daemon : MpsDaemon
    sms : int
        SMs that its share is.
    tolerance_sms : int
        More or fewer than that are let pass.
    model, gpu_pct, **options
        See `WorkerProcess`.
    """

    def __init__(self, daemon: MpsDaemon, sms: int, tolerance_sms: int, model: str, gpu_pct: float, **options: Any) -> None:
        self.daemon, self.sms, self.tolerance_sms = daemon, sms, tolerance_sms
        super().__init__(model, gpu_pct, backend="cuda", **options)
        self._finalizer.detach()
        # Killed with work in flight, a client may wedge the server for all others: the server lets go of it first.
        self._finalizer = weakref.finalize(self, functools.partial(_end_client, daemon), self._process)
        _ALL.add(self)

    def poll(self) -> list[Message]:
        """Return the answers that are here, checked; see `WorkerProcess.poll`."""
        return [self.checked(message) for message in super().poll()]

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Wait for the next answer, checked; see `WorkerProcess.receive`."""
        message = super().receive(timeout_s)
        return None if message is None else self.checked(message)

    def checked(self, message: Message) -> Message:
        """Turn ``ready`` without the SMs of the share into ``failed``, and add cures to what failed."""
        if message["reply"] in ("failed", "error"):
            return message | {"message": with_cure(message["message"])}
        if message["reply"] != "ready":
            return message
        facts = message["facts"]
        if told := facts.get("why_not_shared"):
            self.note = f"; it holds parameters of its own: {told}"
            self.daemon.unshared.append(told)
        granted, why = facts.get("granted_sms"), ""
        if not facts.get("mps") and not self.daemon.serves(self.pid):  # two witnesses: an old driver may not tell it itself
            why = "it computes outside MPS, without a cap: the daemon could not be reached. Close all workers and start again"
        elif not granted:
            why = "it was granted 0 SMs: raise its share"
        elif abs(granted - self.sms) > self.tolerance_sms:
            why = f"its share {self.gpu_pct:g} % is {self.sms} SMs, but {granted} were granted: pass Mps(step_sms=...) or "
            why += f"Mps(rounds_up=...) of this GPU, or accept them with Mps(tolerance_sms={abs(granted - self.sms)})"
        return message if not why else {"reply": "failed", "error": "failed", "message": why}

    def _death(self) -> WorkerDied:
        """As `WorkerProcess._death`; a driver that hung while it mapped parameters is not asked for that again."""
        death = super()._death()
        if death.signal == signal.SIGALRM:
            told = f"the driver did not map them within {MAP_S} s"
            self.daemon.unshared.append(told)
            return WorkerDied(f"{self!r} was ended: parameters are shared no more, {told}", signal=death.signal)
        return death


_ALL: weakref.WeakSet[MpsWorker] = weakref.WeakSet()


def _end_client(daemon: MpsDaemon, process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None and daemon.alive:
        daemon.terminate_client(process.pid)
    end(process)


class SmLeases:
    """SMs held by the launches of one run: never more than there are.

    Parameters
    ----------
    sms : int or None
        SMs to share out; None for no limit.
    """

    def __init__(self, sms: int | None) -> None:
        self._free = math.inf if sms is None else sms
        self._held: dict[int, int] = {}  # by process

    def take(self, worker: MpsWorker) -> None:
        """Book the SMs of a worker's share.

        Raises
        ------
        RuntimeError
            If it holds some already, or too few are free.
        """
        if worker.pid in self._held:
            raise RuntimeError(f"{worker!r} holds SMs already")
        if worker.sms > self._free:
            raise RuntimeError(f"{worker!r} needs {worker.sms} SMs, {self._free:g} are free")
        self._free -= worker.sms
        self._held[worker.pid] = worker.sms

    def give(self, worker: MpsWorker) -> None:
        """Take the SMs back; a worker without any is fine."""
        self._free += self._held.pop(worker.pid, 0)

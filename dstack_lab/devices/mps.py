"""NVIDIA's Multi-Process Service as a device: a share caps the SMs that a worker's process may use."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

from dstack_lab.checks import count, percent, require
from dstack_lab.devices import nvml
from dstack_lab.devices.cuda_errors import shared_fault
from dstack_lab.devices.mps_daemon import (
    CONTROL,
    FOREIGN,
    MpsDaemon,
    MpsError,
    find_program,
    foreign_daemon,
    most_clients,
    refuse_unusable,
    version,
)
from dstack_lab.devices.mps_worker import MpsWorker, SmLeases, clients
from dstack_lab.devices.nvml_sampler import Sampler

PRECISIONS = ("fp16", "bf16", "fp32")

#: A share this close to a grantable one is that one.
ROUNDING_PCT = 0.05
#: Share of the process that holds the parameters: it copies them once. A context takes less memory at a small one.
HOST_PCT = 10.0

_LOCK = threading.Lock()
_DAEMONS: dict[tuple[int, str | None], MpsDaemon] = {}  # by GPU


@dataclass(frozen=True, slots=True)
class Mps:
    """One GPU, shared by processes under a private daemon of NVIDIA's Multi-Process Service.

    A share caps how many SMs a worker may use. It reserves none: that shares held at the same time
    fit together is this package's own bookkeeping. Memory bandwidth, L2 and power stay shared.

    Parameters
    ----------
    device : int
        Which GPU, as ``nvidia-smi`` counts, or among those of ``CUDA_VISIBLE_DEVICES``.
    precision : {"fp16", "bf16", "fp32"}
        Of weights and images.
    channels_last : bool
        Memory format of images and convolutions.
    graphs : bool
        One CUDA graph for each batch; eager otherwise.
    step_sms : int
        SMs are granted in multiples of this.
    rounds_up : bool
        Whether the driver rounds a share between two steps up; those since CUDA 12 round down.
    sms : int, optional
        SMs of the GPU; by default those that the driver tells.
    tolerance_sms : int
        A worker that was granted more or fewer SMs than its share is refused beyond this. The default is the
        coarsest step known (8 SMs, Hopper's co-scheduling): what was granted is in every row of a
        profile and of a trace (``effective_sms``), whatever was asked.
    oversubscribe : bool
        Let shares held at the same time sum to more than 100, as `policies.Uncontrolled` does.
    share_parameters : bool
        Workers of one network map one copy of its parameters, which a process of its own holds (CUDA IPC). Where
        that cannot be, each loads its own, and a mark says so.

    Notes
    -----
    The daemon starts with the first worker. It quits at `stop`, when a ``with`` block is left, and
    at the latest with Python, even if that is killed. The compute mode is never changed.
    """

    device: int = 0
    precision: str = "fp16"
    channels_last: bool = True
    graphs: bool = True
    step_sms: int = 2
    rounds_up: bool = False
    sms: int | None = None
    tolerance_sms: int = 8
    oversubscribe: bool = False
    share_parameters: bool = True

    name: ClassVar[str] = "mps"
    mechanism: ClassVar[str] = "MPS"

    def __post_init__(self) -> None:
        count("device", self.device, least=0)
        require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        count("step_sms", self.step_sms)
        count("tolerance_sms", self.tolerance_sms, least=0)
        if self.sms is not None:
            count("sms", self.sms)
        for field in ("channels_last", "graphs", "rounds_up", "oversubscribe", "share_parameters"):
            require(isinstance(getattr(self, field), bool), field, getattr(self, field), "True or False")

    def all_sms(self) -> int:
        """SMs of the whole GPU.

        Raises
        ------
        RuntimeError
            If there is no GPU, or the driver does not tell.
        """
        found = self.sms or nvml.gpu(self.device).sms
        if found is None:
            raise MpsError("the driver does not tell this GPU's number of SMs: pass it, as in Mps(sms=132)")
        return found

    def shares(self) -> tuple[float, ...]:
        """GPU% that can be granted, in rising order: one more hardware step each, two decimals."""
        return tuple(self._steps())

    def _steps(self) -> dict[float, int]:
        """SMs of each share."""
        sms = self.all_sms()
        inward = math.floor if self.rounds_up else math.ceil  # a rounded share must still grant as many SMs
        steps = {min(100.0, inward(10_000 * n / sms) / 100): n for n in range(self.step_sms, sms + 1, self.step_sms)}
        steps = {share: n for share, n in steps.items() if share >= 1}
        return {**steps, 100.0: sms}

    def sms_for(self, gpu_pct: float) -> int:
        """Return the number of SMs that `gpu_pct` is.

        Raises
        ------
        ValueError
            If it is not a whole number of steps; the message names the nearest shares that are.
        """
        return self._grant(gpu_pct)[1]

    def _grant(self, gpu_pct: float) -> tuple[float, int]:
        """The share of whole steps that `gpu_pct` is, and its SMs."""
        gpu_pct, steps = percent("gpu_pct", gpu_pct), self._steps()
        nearest = min(steps, key=lambda share: abs(share - gpu_pct))
        if abs(nearest - gpu_pct) <= ROUNDING_PCT:
            return nearest, steps[nearest]
        around = [s for s in steps if s < gpu_pct][-1:] + [s for s in steps if s > gpu_pct][:1]
        text = " or ".join(f"{s:g}" for s in around)
        require(False, "gpu_pct", gpu_pct, f"a share of whole steps of {self.step_sms} SMs: nearest {text}")
        raise AssertionError

    def start(
        self,
        model: str,
        gpu_pct: float,
        cores: Sequence[int] | None = None,
        *,
        batches: Sequence[int] = (),
        weights: str | None = None,
        seed: int = 0,
        memory_mib: float | None = None,
    ) -> MpsWorker:
        """Start a worker capped at `gpu_pct` and return at once; `MpsWorker.wait_ready` waits for it.

        Parameters
        ----------
        model : str
            A name of `dstack_lab.zoo`, or one's own network.
        gpu_pct : float
            Cap [%] of the GPU's SMs.
        cores : sequence of int, optional
            Cores of the host that it may run on.
        batches : sequence of int
            Batches to warm up and capture before it says ready.
        weights : str, optional
            ``"DEFAULT"`` for trained weights.
        seed : int
            Of weights and inputs.
        memory_mib : float, optional
            MiB of GPU memory that serving may allocate beyond the loaded network.

        Raises
        ------
        ValueError
            If the share cannot be granted.
        RuntimeError
            If this machine cannot run MPS, or the GPU takes no further client.
        """
        exact, sms = self._grant(gpu_pct)
        daemon = self._daemon()
        env = daemon.client_env(exact) | {"DSTACK_LAB_PRECISION": self.precision}
        env |= {"DSTACK_LAB_CHANNELS_LAST": f"{self.channels_last:d}", "DSTACK_LAB_GRAPHS": f"{self.graphs:d}"}
        if self.share_parameters and not daemon.unshared:
            env["DSTACK_LAB_PARAMETERS"] = daemon.parameters(HOST_PCT).path
        more: dict[str, Any] = {"batches": batches, "weights": weights, "seed": seed, "memory_mib": memory_mib}
        return MpsWorker(daemon, sms, self.tolerance_sms, model, gpu_pct, cores=cores, env=env, **more)

    def _daemon(self) -> MpsDaemon:
        """The running daemon of this GPU, or a fresh one."""
        with _LOCK:
            daemon = _DAEMONS.get(self._key())
            if daemon is not None and not daemon.alive:
                if clients(daemon):
                    raise MpsError("the MPS daemon died under its workers: close them all, then start again")
                daemon.quit()
                daemon = None
            if daemon is None:
                gpu = nvml.gpu(self.device)
                refuse_unusable(gpu)
                alone = len(nvml.gpus()) == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ
                daemon = _DAEMONS[self._key()] = MpsDaemon(None if alone else gpu.uuid)
            most = daemon.most_clients - self.share_parameters
            if len(clients(daemon)) >= most:
                raise MpsError(
                    f"{most} workers run under MPS already, the most that one GPU takes: close some, or plan fewer shares"
                )
            return daemon

    def _key(self) -> tuple[int, str | None]:
        return self.device, os.environ.get("CUDA_VISIBLE_DEVICES")

    def prepare(self) -> None:
        """Start the daemon now, which else the first worker does."""
        self._daemon()

    def stop(self) -> None:
        """Quit the daemon and wait for its end. Without one, or twice, is fine."""
        with _LOCK:
            daemon = _DAEMONS.pop(self._key(), None)
            if daemon is not None:
                for worker in clients(daemon):
                    worker.close()
                daemon.quit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def most_workers(self) -> int:
        """Workers that the GPU takes at the same time, over all services."""
        control = find_program(CONTROL)
        return most_clients(None if control is None else version(control)) - self.share_parameters

    def common_fault(self, said: str = "") -> str | None:
        """Why all workers have to be started anew, if so: the daemon died, or a worker `said` that the server failed."""
        daemon = _DAEMONS.get(self._key())
        if daemon is not None and not daemon.alive:
            return "the MPS daemon died under its workers"
        lost = None if daemon is None else daemon.parameters_lost
        return lost or shared_fault(said)

    def recover(self) -> None:
        """Quit the daemon, after all workers, and start another.

        Raises
        ------
        RuntimeError
            If it does not start.
        """
        self.stop()
        self._daemon()

    def leases(self) -> SmLeases:
        """Which workers hold how many SMs, for one run."""
        return SmLeases(None if self.oversubscribe else self.all_sms())

    def describe(self) -> str:
        """Name of the GPU and number of SMs: ``"NVIDIA H200, 132 SMs"``."""
        return f"{nvml.gpu(self.device).name}, {self.all_sms()} SMs"

    def sampler(self) -> Sampler:
        """Read power, energy and SM activity during a run."""
        return Sampler(self.device)

    def conditions(self) -> dict[str, Any]:
        """Clock, power and throttling of the GPU now (see `nvml.conditions`)."""
        return nvml.conditions(self.device)

    def marks(self) -> tuple[str, ...]:
        """Reservations about numbers recorded here and now, each as ``"kind: sentence"``."""
        gpu, found = nvml.gpu(self.device), []
        daemon = _DAEMONS.get(self._key())
        known = set() if daemon is None else {*daemon.pids, *(worker.pid for worker in clients(daemon))}
        others = set(gpu.processes or ()) - known
        if others and (daemon is None or known & set(gpu.processes or ())):  # else its numbers are of another namespace
            found.append(f"other processes: {len(others)} more on the GPU take turns with the workers")
        if gpu.throttled:
            found.append(f"throttled: {', '.join(gpu.throttled)} holds the clock at {gpu.clock_mhz or 0:g} MHz")
        if foreign_daemon(FOREIGN):
            found.append(f"foreign MPS daemon: another one listens in {FOREIGN}; workers here use their own")
        if self.oversubscribe:
            found.append("oversubscribed shares: caps held at the same time may sum to more than 100 %")
        if daemon is not None and daemon.unshared:
            found.append(f"own parameters: workers of a network do not share them: {daemon.unshared[0]}")
        return tuple(found)

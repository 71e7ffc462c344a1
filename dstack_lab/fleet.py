"""The workers of a run: one for each service and share, replaced when they die, none left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dstack_lab.devices.base import Device, Worker
from dstack_lab.services import Plan

#: Batches up to this are each warmed up; of larger ones the powers of two.
WARM_ALL = 16
#: A service whose workers failed to start this often in a row is given up.
MOST_STARTS = 3


@dataclass(slots=True, eq=False)
class Member:
    """One place in the fleet: a service at a share, and the worker that fills it now."""

    service: str
    model: str
    gpu_pct: float
    batches: tuple[int, ...]
    worker: Worker
    ready: bool = False
    launch: int = -1  #: number of the launch it runs; -1 if none
    overdue_ns: int = 0  #: when that launch counts as hung
    starts: int = 1  #: starts since it was last ready


class Fleet:
    """Start, find and replace the workers of a run.

    Parameters
    ----------
    device : Device
    plan : Plan
    shares : dict of str to tuple of float
        Shares to prepare for each service.
    seed : int
        Of weights and inputs.
    options : dict, optional
        Further arguments of `Device.start`, such as ``memory_mib``.
    """

    def __init__(
        self,
        device: Device,
        plan: Plan,
        shares: dict[str, tuple[float, ...]],
        seed: int,
        options: dict[str, object] | None = None,
    ) -> None:
        self.device, self.seed, self.options = device, seed, options or {}
        self.members: dict[tuple[str, float], Member] = {}
        self.by_fd: dict[int, Member] = {}
        try:
            for service, table in zip(plan.services, plan.tables, strict=True):
                batches = _warm(table.batch_max)
                for share in shares[service.name]:
                    worker = self._start(service.model, share, batches)
                    member = Member(service.name, service.model, share, batches, worker)
                    self.members[service.name, share] = member
                    self.by_fd[worker.fileno()] = member
        except BaseException:
            self.close(force=True)
            raise

    def wait_ready(self, timeout_s: float, tick: Callable[[], object] = lambda: None) -> None:
        """Wait for every worker, calling `tick` after each.

        Raises
        ------
        ValueError, WorkerError
            What the first worker that could not start said.
        """
        for member in self.members.values():
            member.worker.wait_ready(timeout_s)
            member.ready, member.starts = True, 0
            tick()

    def of(self, service: str) -> Iterable[Member]:
        """Members of a service."""
        return [member for member in self.members.values() if member.service == service]

    def replace(self, member: Member) -> bool:
        """Kill a member's worker and start another in its place, without waiting for it.

        Returns
        -------
        bool
            False if that was tried too often in a row: the member has no worker then.
        """
        self.by_fd.pop(member.worker.fileno(), None)
        member.worker.kill()
        member.ready, member.launch = False, -1
        if member.starts >= MOST_STARTS:
            return False
        member.starts += 1
        member.worker = self._start(member.model, member.gpu_pct, member.batches)
        self.by_fd[member.worker.fileno()] = member
        return True

    def close(self, force: bool = False) -> None:
        """End all workers; at once if `force`."""
        for member in self.members.values():
            if force:
                member.worker.kill()
            else:
                member.worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(force=kind is not None)

    def _start(self, model: str, share: float, batches: tuple[int, ...]) -> Worker:
        return self.device.start(model, share, batches=batches, seed=self.seed, **self.options)  # type: ignore[arg-type]


def _warm(batch_max: int) -> tuple[int, ...]:
    """Batches to warm up: the first run of a shape is several times slower than the next."""
    powers = {1 << k for k in range(batch_max.bit_length())}
    return tuple(sorted({*range(1, min(batch_max, WARM_ALL) + 1), *powers, batch_max}))

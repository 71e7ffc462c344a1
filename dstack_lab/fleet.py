"""The workers of a run: one for each service and share that is in use, standbys for those to come, none left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dstack_lab.devices.base import Device, Worker
from dstack_lab.services import Plan
from dstack_lab.starter import Arrival, Order, Starter

#: Batches up to this are each warmed up; of larger ones the powers of two.
WARM_ALL = 16
#: A worker that failed to start this often in a row is given up.
MOST_STARTS = 3


@dataclass(slots=True, eq=False)
class Member:
    """One place in the fleet: a service at a share, and the worker that fills it."""

    order: Order
    worker: Worker
    ready: bool = False
    launch: int = -1  #: number of the launch it runs; -1 if none
    wanted_pct: float = 0.0  #: share that this launch asked for
    overdue_ns: int = 0  #: when that launch counts as hung
    used_ns: int = 0  #: when it was last given a launch
    starts: int = 1  #: starts since it was last ready

    @property
    def service(self) -> str:
        """Whose requests it serves."""
        return self.order.service

    @property
    def gpu_pct(self) -> float:
        """Its share."""
        return self.order.gpu_pct


class Fleet:
    """Start, find, add and replace the workers of a run. All but the first ones start in the background.

    Parameters
    ----------
    device : Device
    plan : Plan
    shares : dict of str to tuple of float
        Shares that may be asked for, for each service.
    seed : int
        Of weights and inputs.
    options : dict, optional
        Further arguments of `Device.start`, such as ``memory_mib``.
    first : dict of str to tuple of float, optional
        Shares to prepare before the run; all of `shares` by default.
    """

    def __init__(
        self,
        device: Device,
        plan: Plan,
        shares: dict[str, tuple[float, ...]],
        seed: int,
        options: dict[str, object] | None = None,
        first: dict[str, tuple[float, ...]] | None = None,
    ) -> None:
        self.device, self.shares = device, shares
        self.members: dict[tuple[str, float], Member] = {}
        self.coming: dict[tuple[str, float], Order] = {}
        self.lost: set[tuple[str, float]] = set()
        self.by_fd: dict[int, Member] = {}
        self.restarting = False  #: all workers are being ended
        #: No worker stands in for another: all are there, and a lost one means that those in its process are too.
        self.exact = getattr(device, "prepares_all", False)
        self.most: float = device.most_workers() if hasattr(device, "most_workers") else math.inf
        self.starter = Starter(device, seed, options or {})
        self._made = {s.name: (s.model, _warm(t.batch_max)) for s, t in zip(plan.services, plan.tables, strict=True)}
        try:
            for service in plan.services:
                for share in (first or shares)[service.name]:
                    order = self._order(service.name, share)
                    self._join(order, self.starter.start(order))
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

    def serves(self, service: str) -> bool:
        """Whether a worker of a service is ready, busy or not; all of them, where none stands in for another."""
        if self.exact:
            return (
                not self.hopeless(service)
                and all(m.ready for m in self.of(service))
                and not any(name == service for name, _ in self.coming)
            )
        return any(member.ready for member in self.of(service))

    def hopeless(self, service: str) -> bool:
        """Whether a service has no worker, and none will come; or one too few, where none stands in for another."""
        if self.exact:
            return any(name == service for name, _ in self.lost)
        return not self.of(service) and not any(name == service for name, _ in self.coming)

    def find(self, service: str, gpu_pct: float, room_pct: float) -> Member | None:
        """A ready idle worker for a launch: at its share, else the largest below, else the nearest above with room.

        Parameters
        ----------
        service : str
        gpu_pct : float
            Share that was asked for, and is held.
        room_pct : float
            Share that is free beside it.
        """
        idle = [m for m in self.of(service) if m.ready and m.launch < 0 and m.gpu_pct <= gpu_pct + room_pct]
        idle = [m for m in idle if m.gpu_pct == gpu_pct] if self.exact else idle
        below = [m for m in idle if m.gpu_pct <= gpu_pct]
        return max(below, key=lambda m: m.gpu_pct) if below else min(idle, key=lambda m: m.gpu_pct, default=None)

    def want(self, service: str, gpu_pct: float) -> tuple[bool, Member | None]:
        """Start a standby, unless there is one or the service has one coming.

        Where the GPU takes no more workers, the idle one that was used longest ago is retired for it,
        if it is not the last of its service.

        Returns
        -------
        bool
            Whether one starts now.
        Member or None
            Who was retired for it.
        """
        key = service, gpu_pct
        if key in self.members or key in self.lost or any(name == service for name, _ in self.coming):
            return False, None
        if any(not member.ready for member in self.of(service)):  # one at a time: starting one takes the host's time
            return False, None
        retired = None
        if len(self.members) + len(self.coming) >= self.most:
            idle = [m for m in self.members.values() if m.ready and m.launch < 0]
            idle = [m for m in idle if sum(other.ready for other in self.of(m.service)) > 1]
            retired = min(idle, key=lambda m: m.used_ns, default=None)
            if retired is None:
                return False, None
            self._part(retired)
            self.starter.retire(retired.worker)
        self._start(None, self._order(service, gpu_pct)._replace(standby=True))
        return True, retired

    def replace(self, member: Member) -> bool:
        """End a member's worker and start another in its place, without waiting for either.

        Returns
        -------
        bool
            False if that was tried too often in a row: the place is lost then.
        """
        self._part(member)
        order = member.order._replace(starts=member.starts + 1)
        if member.starts >= MOST_STARTS:
            self.lost.add(order.key)
            self.starter.retire(member.worker, force=True)
            return False
        self._start(member.worker, order)
        return True

    def restart(self) -> None:
        """End all workers, let the device begin anew, and start as many again, without waiting for it."""
        orders = [m.order for m in self.members.values()] + list(self.coming.values())
        self.members.clear()
        self.by_fd.clear()
        self.coming = {order.key: order._replace(starts=1) for order in orders}
        self.restarting = True
        self.starter.restart(list(self.coming.values()), getattr(self.device, "recover", lambda: None))

    def arrivals(self) -> list[Arrival]:
        """Let workers that were started join; return the orders that failed."""
        failed = []
        for arrival in self.starter.arrivals():
            self.restarting = False
            if not arrival.common:
                self.coming.pop(arrival.order.key, None)
            if arrival.worker is None:
                failed.append(arrival)
            else:
                self._join(arrival.order, arrival.worker)
        return failed

    def again(self, order: Order) -> bool:
        """Repeat an order that failed; False if that was done too often: the place is lost then."""
        if order.starts >= MOST_STARTS:
            self.lost.add(order.key)
            return False
        self._start(None, order._replace(starts=order.starts + 1))
        return True

    def close(self, force: bool = False) -> None:
        """End all workers; at once if `force`."""
        self.starter.close(force)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(force=kind is not None)

    def _order(self, service: str, gpu_pct: float) -> Order:
        model, batches = self._made[service]
        return Order(service, model, gpu_pct, batches)

    def _start(self, old: Worker | None, order: Order) -> None:
        self.coming[order.key] = order
        self.starter.replace(old, order)

    def _join(self, order: Order, worker: Worker) -> None:
        member = Member(order, worker, starts=order.starts)
        self.members[order.key] = self.by_fd[worker.fileno()] = member

    def _part(self, member: Member) -> None:
        self.by_fd.pop(member.worker.fileno(), None)
        self.members.pop(member.order.key, None)
        member.ready, member.launch = False, -1


def _warm(batch_max: int) -> tuple[int, ...]:
    """Batches to warm up: the first run of a shape is several times slower than the next."""
    powers = {1 << k for k in range(batch_max.bit_length())}
    return tuple(sorted({*range(1, min(batch_max, WARM_ALL) + 1), *powers, batch_max}))

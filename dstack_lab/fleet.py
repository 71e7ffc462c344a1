"""The workers of a run: those of each service and share that is in use, standbys for those to come, none left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from dstack_lab.devices.base import Device, Worker
from dstack_lab.ledger import SHARE_SLACK
from dstack_lab.services import Plan
from dstack_lab.starter import Arrival, Order, Place, Starter

#: Batches up to this are each warmed up; of larger ones the powers of two.
WARM_ALL = 16
#: A worker that failed to start this often in a row is given up.
MOST_STARTS = 3


def beside(gpu_pct: float, copies: int, oversubscribes: bool = False) -> int:
    """Workers of one service at a share that can be busy at once: `copies`, as far as they fit on the GPU together."""
    fit = int((100 + SHARE_SLACK) / gpu_pct + 1e-9)
    return copies if oversubscribes else max(1, min(copies, fit))


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
    copies : int
        Launches of one service at one share that may run at once: each share has as many workers, as far as they fit
        beside each other. Where the GPU takes fewer workers than that, further copies are left out, one by one
        of each service and share, never the first.
    oversubscribes : bool
        Launches need not fit beside each other.
    """

    def __init__(
        self,
        device: Device,
        plan: Plan,
        shares: dict[str, tuple[float, ...]],
        seed: int,
        options: dict[str, object] | None = None,
        first: dict[str, tuple[float, ...]] | None = None,
        copies: int = 1,
        oversubscribes: bool = False,
    ) -> None:
        self.device, self.shares, self.first = device, shares, first or shares
        self.copies, self.oversubscribes = copies, oversubscribes
        self.members: dict[Place, Member] = {}
        self.coming: dict[Place, Order] = {}
        self.lost: set[Place] = set()
        self.left_out: dict[tuple[str, float], int] = {}  #: further copies that the GPU does not take
        self.by_fd: dict[int, Member] = {}
        self.restarting = False  #: all workers are being ended
        #: No worker stands in for one of another share: all are there, and a lost one means that those in its process are too.
        self.exact = getattr(device, "prepares_all", False)
        self.most: float = device.most_workers() if hasattr(device, "most_workers") else math.inf
        self.starter = Starter(device, seed, options or {})
        self._made = {s.name: (s.model, _warm(t.batch_max)) for s, t in zip(plan.services, plan.tables, strict=True)}
        try:
            for copy in range(copies):
                for service in plan.services:
                    for share in self.first[service.name]:
                        if copy < self.places(share):
                            self._begin(service.name, share, copy)
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

    def at(self, service: str, gpu_pct: float) -> list[Member]:
        """Members of a service at a share."""
        return [member for member in self.of(service) if member.gpu_pct == gpu_pct]

    def places(self, gpu_pct: float) -> int:
        """Workers that each service may have at a share."""
        return beside(gpu_pct, self.copies, self.oversubscribes)

    def serves(self, service: str) -> bool:
        """Whether a worker of a service is ready, busy or not.

        Where all live in one process: one of each share, and none is loading, for then the others may be lost with that process.
        """
        mine = list(self.of(service))
        if self.exact and (not all(member.ready for member in mine) or any(name == service for name, *_ in self.coming)):
            return False
        return self._suffice(service, {member.gpu_pct for member in mine if member.ready})

    def hopeless(self, service: str) -> bool:
        """Whether a service has no worker, and none will come; or none of a share, where none stands in for another share."""
        return not self._suffice(service, {share for name, share, _ in [*self.members, *self.coming] if name == service})

    def _suffice(self, service: str, shares: set[float]) -> bool:
        return shares.issuperset(self.first[service]) if self.exact else bool(shares)

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
        if self.exact and not self.serves(service):
            return None
        idle = [m for m in self.of(service) if m.ready and m.launch < 0 and m.gpu_pct <= gpu_pct + room_pct]
        idle = [m for m in idle if m.gpu_pct == gpu_pct] if self.exact else idle
        below = [m for m in idle if m.gpu_pct <= gpu_pct]
        if below:
            return max(below, key=lambda m: (m.gpu_pct, -m.order.copy))
        return min(idle, key=lambda m: (m.gpu_pct, m.order.copy), default=None)

    def want(self, service: str, gpu_pct: float) -> tuple[bool, Member | None]:
        """Start a standby, unless there are enough or the service has one coming.

        Where the GPU takes no more workers, an idle one is retired for it, if it is not the last of its service: a further
        copy of some share first, else the one that was used longest ago. A further copy has nobody retired for it.

        Returns
        -------
        bool
            Whether one starts now.
        Member or None
            Who was retired for it.
        """
        orders = (self._order(service, gpu_pct, copy) for copy in range(self.places(gpu_pct)))
        order = next((o for o in orders if o.key not in self.members and o.key not in self.lost), None)
        if order is None or any(name == service for name, *_ in self.coming):
            return False, None
        if any(not member.ready for member in self.of(service)):  # one at a time: starting one takes the host's time
            return False, None
        retired = None
        if len(self.members) + len(self.coming) >= self.most:
            idle = [m for m in self.members.values() if m.ready and m.launch < 0]
            idle = [m for m in idle if sum(other.ready for other in self.of(m.service)) > 1]
            retired = min(idle, key=lambda m: (len(self.at(m.service, m.gpu_pct)) == 1, m.used_ns), default=None)
            if retired is None or self.at(service, gpu_pct):
                return False, None
            self._part(retired)
            self.starter.retire(retired.worker)
        self._start(None, order._replace(standby=True))
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

    def _order(self, service: str, gpu_pct: float, copy: int) -> Order:
        model, batches = self._made[service]
        return Order(service, model, gpu_pct, batches, copy=copy)

    def _begin(self, service: str, gpu_pct: float, copy: int) -> None:
        if copy and len(self.members) >= self.most:
            self.left_out[service, gpu_pct] = self.left_out.get((service, gpu_pct), 0) + 1
        else:
            order = self._order(service, gpu_pct, copy)
            self._join(order, self.starter.start(order))

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

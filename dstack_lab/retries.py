"""What becomes of a launch without a worker: it waits for one; its requests are tried again if it failed, and once only."""

from __future__ import annotations

import numpy as np

from dstack_lab.ledger import Ledger
from dstack_lab.state import Launch


class Retries:
    """Launches that wait for a worker, requests that failed once, services that are given up.

    Launches of one service may run beside each other and fail in any order, so that each request is remembered.

    Parameters
    ----------
    ledger : Ledger
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._failed = [np.zeros(times.size, dtype=bool) for times in ledger.arrivals_ns]
        self.parked: list[tuple[int, Launch]] = []  #: booked, but every worker that fits is busy or gone
        self.given_up: set[str] = set()
        self._again: set[int] = set()  # launches that failed and are parked, at a share that the policy may not have asked for

    def waiting(self, service: str, gpu_pct: float) -> int:
        """Launches of a service at a share that wait for their first worker."""
        asked = [launch for number, launch in self.parked if number not in self._again]
        return sum(launch.service == service and launch.gpu_pct == gpu_pct for launch in asked)

    def take_back(self, number: int, doubt: bool) -> tuple[str, str]:
        """Let the requests of a launch that failed wait again; return what became of them, as kind and detail of an event.

        With `doubt` it may be their fault: the oldest of them, as far as they failed before, are dropped. Launches
        of the service that wait for a worker go back to the queue too, the latest first: a queue has one head. A
        failed one that another has overtaken cannot: it waits for a worker as it is, with its share.
        """
        ledger = self._ledger
        view, share, batch, _, _ = ledger.state._running[number]
        if view.name in self.given_up:
            ledger.cut(number, batch)
            return "gave up", f"{batch} requests failed and were dropped: nobody else serves them"
        ledger.show(view)
        first = ledger.first_of(number)
        failed = self._failed[view.index][first : first + batch]
        lost = (batch if failed.all() else int(failed.argmin())) if doubt else 0
        failed |= doubt
        kept = batch - lost
        if lost:
            ledger.cut(number, lost)
        if kept:
            self.parked.append((number, Launch(view.name, share, kept)))
            self._again.add(number)
        mine = sorted((n for n, launch in self.parked if launch.service == view.name), reverse=True)
        back = {n for n in mine if ledger.requeue(n)}
        self.parked = [waiting for waiting in self.parked if waiting[0] not in back]
        waits = f"{kept} requests wait for a fresh worker"
        if not lost:
            return "retried", waits
        dropped = f"{lost} requests failed twice and were dropped"
        return "gave up", f"{dropped}, {waits}" if kept else dropped

    def give_up(self, service: str) -> None:
        """Drop the requests of a service: those of launches that wait for a worker, and all that wait or come."""
        ledger, view = self._ledger, self._ledger.state.by_name[service]
        ledger.show(view)
        for number, launch in self.parked:
            if launch.service == service:
                ledger.cut(number, launch.batch)
        self.parked = [waiting for waiting in self.parked if waiting[1].service != service]
        self.given_up.add(service)
        ledger.hide(view)
        ledger.abandon(view)

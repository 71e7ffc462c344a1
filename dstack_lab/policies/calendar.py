"""The windows of a period plan, repeated period after period."""

from __future__ import annotations

from typing import NamedTuple

from dstack_lab.policies.windows import EPSILON, PeriodPlan
from dstack_lab.state import NS_PER_MS, GpuState, ServiceView


class Booking(NamedTuple):
    """One window of one period, on the clock of the run; `next_end_ms` is when the service's following one ends."""

    start_ms: float
    end_ms: float
    next_end_ms: float
    service: str
    gpu_pct: float


class Calendar:
    """Position in the endless sequence of windows.

    Parameters
    ----------
    period : PeriodPlan
    start_ms : float
        When the first period begins [ms].

    Attributes
    ----------
    windows : tuple of Window
        Those of one period, by start.
    next_ms : float
        Start of the next window that has not been taken [ms].
    """

    def __init__(self, period: PeriodPlan, start_ms: float = 0.0) -> None:
        self._period_ms = period.period_ms
        self.windows = period.windows
        self._began_ms = start_ms  # of the first period that is not written out
        self._ahead: list[Booking] = []  # windows written out so far, those taken included
        self._taken = 0
        self.next_ms = self.windows[0].start_ms

    def take_due(self, now_ms: float) -> list[Booking]:
        """Windows that have started since the last call."""
        due = self.before(now_ms + 2 * EPSILON)
        self._taken += len(due)
        if self._taken == len(self._ahead):
            self._write_out()
        if self._taken > 8 * len(self.windows):  # forget them now and then: a list is slow to shorten at its front
            del self._ahead[: self._taken]
            self._taken = 0
        self.next_ms = self._ahead[self._taken].start_ms
        return due

    def before(self, end_ms: float) -> list[Booking]:
        """Windows not taken yet that start before `end_ms`."""
        limit, first, ahead = end_ms - EPSILON, self._taken, self._ahead
        last = first
        while True:
            while last < len(ahead) and ahead[last].start_ms < limit:
                last += 1
            if last < len(ahead):
                return ahead[first:last]
            self._write_out()

    def leaves_room(self, state: GpuState, service: ServiceView, share: float, end_ms: float) -> bool:
        """Whether every window that starts before `end_ms` gets its share beside `share` more, held by `service`.

        Windows of `service` do not count, and whoever still runs when one starts gives its own away.
        """
        ahead = self.before(end_ms)
        name, running, checked = service.name, state._running.values(), -1.0
        for start, *_, owner, _ in ahead:
            if owner == name or start == checked:
                continue
            checked = start
            at, holders, held, reserved = start * NS_PER_MS + 0.5, set[str](), 0.0, 0.0
            for view, other, _, _, until in running:
                if until > at:
                    held += other
                    holders.add(view.name)
            for begin, stop, _, of, pct in ahead:
                if begin <= start < stop and of != name and of not in holders:
                    reserved += pct
            if reserved + share + held > 100 + EPSILON:
                return False
        return True

    def _write_out(self) -> None:
        """Add one more period."""
        began = self._began_ms
        self._ahead += [
            Booking(began + w.start_ms, began + w.end_ms, began + w.next_end_ms, w.service, w.gpu_pct) for w in self.windows
        ]
        self._began_ms = began + self._period_ms

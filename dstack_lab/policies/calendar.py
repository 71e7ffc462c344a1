"""The windows of a period plan, repeated period after period."""

from __future__ import annotations

from typing import NamedTuple

from dstack_lab.policies.windows import EPSILON_MS, PeriodPlan


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
        self._cursor, self._began_ms = 0, start_ms
        self.next_ms = self.windows[0].start_ms

    def take_due(self, now_ms: float) -> list[Booking]:
        """Windows that have started since the last call."""
        due = self.before(now_ms + 2 * EPSILON_MS)
        for _ in due:
            self._cursor, self._began_ms = self._following(self._cursor, self._began_ms)
        self.next_ms = self._began_ms + self.windows[self._cursor].start_ms
        return due

    def before(self, end_ms: float) -> list[Booking]:
        """Windows not taken yet that start before `end_ms`."""
        ahead: list[Booking] = []
        cursor, began = self._cursor, self._began_ms
        while True:
            window = self.windows[cursor]
            start = began + window.start_ms
            if start >= end_ms - EPSILON_MS:
                return ahead
            ahead.append(Booking(start, began + window.end_ms, began + window.next_end_ms, window.service, window.gpu_pct))
            cursor, began = self._following(cursor, began)

    def _following(self, cursor: int, began_ms: float) -> tuple[int, float]:
        return (cursor + 1, began_ms) if cursor + 1 < len(self.windows) else (0, began_ms + self._period_ms)

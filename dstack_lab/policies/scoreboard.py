"""Who received how much of the GPU lately: what fairness is decided on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Scoreboard:
    """GPU%·ms received by each service over the last periods.

    Parameters
    ----------
    services : iterable of str
    period_ms : float
        Length of a period [ms].
    memory : int
        Periods that count, the present one included.
    """

    def __init__(self, services: Iterable[str], period_ms: float, memory: int = 10) -> None:
        self.received = dict.fromkeys(services, 0.0)  #: GPU%·ms by service, over the periods that count
        self.period_ms = period_ms
        self._pages = deque([dict.fromkeys(self.received, 0.0)], maxlen=memory)
        self._turn_at = period_ms

    def add(self, now_ms: float, service: str, area_pct_ms: float) -> None:
        """Book a launch of `area_pct_ms` = GPU% x predicted service time."""
        while now_ms >= self._turn_at:
            if len(self._pages) == self._pages.maxlen:
                for name, area in self._pages[0].items():
                    self.received[name] -= area
            self._pages.append(dict.fromkeys(self.received, 0.0))
            self._turn_at += self.period_ms
        self._pages[-1][service] += area_pct_ms
        self.received[service] += area_pct_ms

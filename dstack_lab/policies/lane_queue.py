"""What comes of requests when the services of one lane take turns in it: who is late."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.state import INFINITE

#: Who is later than its deadline by less than this is in time: sums round.
EPSILON_MS = 1e-9


class Rider(NamedTuple):
    """A service in a lane.

    `arrivals_ms` ascend. ``times_ms[b - 1]`` is how long a batch of b takes in the lane; `batch` is the largest one.
    Requests are given up `margin_ms` before their deadline.
    """

    arrivals_ms: Sequence[float]
    slo_ms: float
    batch: int
    times_ms: Sequence[float]
    margin_ms: float = 0.0


def late_in_turns(riders: Sequence[Rider], drop: bool, fair_ms: float = 0.0) -> list[float]:
    """Part of each service's requests that is late, or with `drop` late or given up.

    Whenever the lane is idle, the service that has to begin first to be in time, with all that waits up to its
    largest batch, begins; with `fair_ms` the one that had least of the lane in about ten periods of that length.
    Simulated request by request, as `lane_keeper` does it.
    """
    served = Scoreboard(map(str, range(len(riders))), fair_ms) if fair_ms else None
    count = len(riders)
    heads, late, now = [0] * count, [0] * count, 0.0
    rows = []
    for i, (arrivals, slo, batch, times, margin) in enumerate(riders):
        padded = [*arrivals, *[INFINITE] * (batch + 1)]  # so that a batch ahead can be looked at
        rows.append((i, padded, slo, batch, times, margin - slo if drop else -INFINITE))
    while True:
        first, begin, size, upcoming = -1, INFINITE, 0, INFINITE
        for i, arrivals, slo, batch, times, margin in rows:
            head = heads[i]
            oldest = arrivals[head]
            if oldest < now + margin:
                lost = bisect_left(arrivals, now + margin, head)
                late[i] += lost - head
                heads[i] = head = lost
                oldest = arrivals[head]
            if oldest > now:
                if oldest < upcoming:
                    upcoming = oldest
                continue
            waiting = bisect_right(arrivals, now, head, head + batch) - head
            must = oldest + slo - times[waiting - 1] if served is None else served.received[str(i)]
            if must < begin:
                first, begin, size = i, must, waiting
        if first < 0:
            if upcoming == INFINITE:
                return [n / len(r.arrivals_ms) if r.arrivals_ms else 0.0 for n, r in zip(late, riders, strict=True)]
            now = upcoming
            continue
        _, arrivals, slo, _, times, _ = rows[first]
        head = heads[first]
        if served is not None:
            served.add(now, str(first), times[size - 1])
        now += times[size - 1]
        heads[first] = head + size
        if arrivals[head] < now - slo - EPSILON_MS:
            late[first] += bisect_left(arrivals, now - slo - EPSILON_MS, head, head + size) - head

"""What comes of requests when the services of one lane take turns in it: who is late."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple


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


def late_in_turns(riders: Sequence[Rider], drop: bool) -> list[float]:
    """Part of each service's requests that is late, or with `drop` late or given up.

    Whenever the lane is idle, the service that has to begin first to be in time, with all that waits up to its
    largest batch, begins. Simulated request by request, as `lane_keeper` does it.
    """
    count = len(riders)
    heads, late, now = [0] * count, [0] * count, 0.0
    margins = [rider.margin_ms - rider.slo_ms for rider in riders]
    while True:
        first, begin, size, upcoming = -1, float("inf"), 0, float("inf")
        for i, (arrivals, slo, batch, times, _) in enumerate(riders):
            head = heads[i]
            if drop:
                lost = bisect_left(arrivals, now + margins[i], head)
                late[i] += lost - head
                heads[i] = head = lost
            if head == len(arrivals):
                continue
            if arrivals[head] > now:
                upcoming = min(upcoming, arrivals[head])
                continue
            waiting = bisect_right(arrivals, now, head, min(head + batch, len(arrivals))) - head
            must = arrivals[head] + slo - times[waiting - 1]
            if must < begin:
                first, begin, size = i, must, waiting
        if first < 0:
            if upcoming == float("inf"):
                return [n / len(r.arrivals_ms) if r.arrivals_ms else 0.0 for n, r in zip(late, riders, strict=True)]
            now = upcoming
            continue
        rider, head = riders[first], heads[first]
        now += rider.times_ms[size - 1]
        heads[first] = head + size
        late[first] += bisect_left(rider.arrivals_ms, now - rider.slo_ms - 1e-9, head, head + size) - head

"""What comes of requests in slots: a run of `SlotKeeper` without an engine, for plans that try many ways to cut a GPU."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple

from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.slots import ENOUGH, EPSILON, MEMORY, cut, in_time
from dstack_lab.state import INFINITE

#: Who is later than its deadline by less than this is in time: sums round.
EPSILON_MS = 1e-9


class Rider(NamedTuple):
    """A service in slots of one share.

    `arrivals_ms` ascend. It uses `copies` slots at once, at most. ``times[b]`` is how long a batch of b takes, from a
    batch of 0 on. A batch is ready when it has `full` requests or its oldest has waited `wait_ms`.
    """

    arrivals_ms: Sequence[float]
    slo_ms: float
    gpu_pct: float
    copies: int
    greedy: bool
    times: list[float]
    full: int
    wait_ms: float


def late_in_slots(riders: Sequence[Rider], worth: float, drop: bool, greedy_pct: float = 100.0) -> tuple[list[int], float]:
    """Requests of each service that are late or given up, and the mean latency of those launched, as a part of the SLO."""
    count, now, free = len(riders), 0.0, 100.0
    scores = Scoreboard(map(str, range(count)), max(r.slo_ms for r in riders), MEMORY)
    received = scores.received
    heads, late, flight, spent, served = [0] * count, [0] * count, [0] * count, 0.0, 0
    most = [len(r.times) - 1 for r in riders]
    rows = [[*r.arrivals_ms, *[INFINITE] * (m + 1)] for r, m in zip(riders, most, strict=True)]
    sums = [list(accumulate(r.arrivals_ms, initial=0.0)) for r in riders]
    ready = [min(row[r.full - 1], row[0] + r.wait_ms) for row, r in zip(rows, riders, strict=True)]
    needs = min(r.gpu_pct for r in riders) - EPSILON
    running: list[tuple[float, int]] = []
    again, left, crowded = False, greedy_pct + EPSILON, any(r.greedy for r in riders)
    while True:
        order, pressing = [], running[0][0] if crowded and running else now
        for i in range(count):
            if ready[i] <= now and flight[i] < riders[i].copies:
                row, head, rider = rows[i], heads[i], riders[i]
                waits = bisect_right(row, now, head, head + most[i]) - head
                begin = row[head] + rider.slo_ms - rider.times[waits]
                first = begin < pressing
                order.append((not first, received[str(i)] if first else begin, i, waits))
        order.sort()
        again = False
        for _, _, i, waits in order:
            rider, row, head = riders[i], rows[i], heads[i]
            if rider.gpu_pct > free + EPSILON:
                break
            if rider.greedy and rider.gpu_pct > left:
                continue
            times, slo = rider.times, rider.slo_ms
            batch = in_time(times, waits, row[head] + slo - now)
            if batch < ENOUGH * waits:
                batch = waits
                if drop:
                    waiting = bisect_right(row, now, head) - head
                    lost, batch = cut(times, waiting, now, _deadlines(row, head, slo), worth)
                    late[i] += lost
                    head += lost
            if batch:
                took = times[batch]
                scores.add(now, str(i), rider.gpu_pct * took)
                end = now + took
                if row[head] < (before := end - slo - EPSILON_MS):
                    late[i] += bisect_left(row, before, head, head + batch) - head
                spent += (end * batch - (sums[i][head + batch] - sums[i][head])) / slo
                served += batch
                head += batch
                free -= rider.gpu_pct
                left -= rider.gpu_pct * rider.greedy
                flight[i] += 1
                heappush(running, (end, i))
                again = again or batch < waits or waits == most[i]
            heads[i] = head
            ready[i] = min(row[head + rider.full - 1], row[head] + rider.wait_ms)
        if again and free >= needs:
            continue
        upcoming = running[0][0] if running else INFINITE
        if free >= needs:
            for at in ready:
                if now < at < upcoming:
                    upcoming = at
        if upcoming == INFINITE:
            for i in range(count):
                late[i] += len(riders[i].arrivals_ms) - heads[i]  # never launched
            return late, spent / max(served, 1)
        now = upcoming
        while running and running[0][0] <= now:
            _, i = heappop(running)
            flight[i] -= 1
            free = free + riders[i].gpu_pct if running else 100.0
            left += riders[i].gpu_pct * riders[i].greedy


def _deadlines(row: list[float], head: int, slo_ms: float) -> Callable[[int], float]:
    """Deadline of a waiting request, the oldest at position 0."""
    return lambda position: row[head + position] + slo_ms

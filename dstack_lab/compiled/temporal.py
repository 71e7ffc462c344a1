"""`Temporal` compiled: the whole GPU for one batch at a time.

While a batch runs nothing can happen, and as soon as it ends the GPU is either given to the nearest
deadline or idle until the next arrival: no queue of events is needed.
"""

from __future__ import annotations

import numpy as np

from dstack_lab.compiled.books import BROKEN, DONE, DROPPED, FULL, LAST_NS, Books, Integers, Log, Outcome, Queues
from dstack_lab.compiled.jit import jit
from dstack_lab.policies.temporal import Temporal
from dstack_lab.state import NEVER_NS, NS_PER_MS

#: Places in `clock`.
NOW, LAUNCHED_AT, LAUNCHES, WAITING = range(4)


def run(policy: Temporal, books: Books, slo_ns: Integers, _: Integers, duration_ns: int, stall_ns: int) -> Outcome:
    """Run to the end; return how that went (`DONE` or `BROKEN`), the number of launches and the notes by code."""
    plan, share = books.plan, policy.share
    most = np.array([policy.batch[s.name] for s in plan.services], dtype=np.int64)
    cost = np.zeros((len(most), int(most.max()) + 1), dtype=np.int64)
    margin = np.zeros(len(most), dtype=np.int64)
    for i, table in enumerate(plan.tables):
        for b in range(1, int(most[i]) + 1):
            cost[i, b] = max(1, round(table.at(b, share) * NS_PER_MS))
        margin[i] = round(table.at(1, share) * NS_PER_MS) - slo_ns[i] - 1
    clock = np.array([0, 0, 0, books.total], dtype=np.int64)
    limits = np.array([duration_ns, stall_ns], dtype=np.int64)
    while (how := _run(books.queues, books.log, slo_ns, most, cost, margin, policy.drop_late, share, limits, clock)) == FULL:
        books.resize()
    return how, int(clock[LAUNCHES]), [""]


@jit
def _run(
    queues: Queues,
    log: Log,
    slo: Integers,
    most: Integers,
    cost: Integers,
    margin: Integers,
    drop_late: bool,
    share: float,
    limits: Integers,
    clock: Integers,
) -> int:
    arrival, head, stop = queues.arrival_ns, queues.head, queues.stop
    duration, stall = limits[0], limits[1]
    now, launched_at, number, waiting = clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING]
    services, room = head.size, log.batch.size
    first = np.empty(services, dtype=np.int64)  # arrival of each service's oldest request
    due = np.empty(services, dtype=np.int64)  # its deadline
    for i in range(services):
        first[i] = arrival[head[i]] if head[i] < stop[i] else NEVER_NS
        due[i] = first[i] + slo[i] if head[i] < stop[i] else NEVER_NS
    how = DONE
    while waiting > 0:  # the GPU is free, and the policy decides
        if now > LAST_NS:
            how = BROKEN
            break
        if number == room:
            how = FULL
            break
        if drop_late:
            before = waiting
            for i in range(services):
                last = min(now + margin[i], now)
                if first[i] > last:
                    continue
                k = head[i]
                while k < stop[i] and arrival[k] <= last:
                    queues.arrival_ms[k] = arrival[k] / NS_PER_MS
                    queues.start_ms[k] = queues.finish_ms[k] = np.nan
                    queues.launch[k] = -1
                    queues.outcome[k] = DROPPED
                    k += 1
                waiting -= k - head[i]
                head[i] = k
                first[i] = arrival[k] if k < stop[i] else NEVER_NS
                due[i] = first[i] + slo[i] if k < stop[i] else NEVER_NS
            if waiting < before:  # the policy asks for another turn at once
                if now > duration and now > max(duration, launched_at) + stall:
                    break
                continue
        best, nearest = -1, NEVER_NS
        for i in range(services):  # without branches, which the processor could only guess
            better = (first[i] <= now) & (due[i] < nearest)
            nearest = due[i] if better else nearest
            best = i if better else best
        if best < 0:
            now = first.min()
            if now > duration and now > max(duration, launched_at) + stall:
                break
            continue
        begin = head[best]
        end = min(begin + most[best], stop[best])
        k = begin + 1
        while k < end and arrival[k] <= now:
            k += 1
        head[best], batch = k, k - begin
        first[best] = arrival[k] if k < stop[best] else NEVER_NS
        due[best] = first[best] + slo[best] if k < stop[best] else NEVER_NS
        until = now + cost[best, batch]
        start_ms, end_ms = now / NS_PER_MS, until / NS_PER_MS
        for row in range(begin, k):
            queues.arrival_ms[row] = arrival[row] / NS_PER_MS
            queues.start_ms[row] = start_ms
            queues.finish_ms[row] = end_ms
            queues.launch[row] = number
        log.service[number], log.batch[number] = best, batch
        log.start_ms[number], log.end_ms[number] = start_ms, end_ms
        log.share[number], log.note[number] = share, 0
        launched_at, now = now, until
        number += 1
        waiting -= batch
    clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING] = now, launched_at, number, waiting
    return how

"""The loop of `DStack` in slots, on the arrays of a run.

Reads like `policies/slots.py` with indices for names. Launches in flight are listed in the order of their start.
As in `dstack_kernel`, all that is compiled together lies in one file, and the loop is one long function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dstack_lab.compiled.books import BROKEN, DONE, DROPPED, FULL, LAST_NS, Floats, Integers, Log, Queues
from dstack_lab.compiled.jit import jit
from dstack_lab.compiled.notes import PLANNED
from dstack_lab.state import NEVER_NS, NS_PER_MS

if TYPE_CHECKING:
    from dstack_lab.compiled.slots import Memory, Rules

#: Places in `Memory.clock`, which keeps a run that stops for a longer log.
NOW, LAUNCHED_AT, LAUNCHES, WAITING, AGAIN, RUNNING = range(6)


@jit
def ready(arrival: Integers, head: int, stop: int, full: int, wait: int) -> int:
    """When a batch is full or its oldest request has waited."""
    if head >= stop:
        return NEVER_NS
    at = arrival[head + full - 1] if head + full <= stop else NEVER_NS
    return min(at, arrival[head] + wait)  # type: ignore[no-any-return]


@jit
def _waiting(arrival: Integers, head: int, stop: int, now: int) -> int:
    """Requests from `head` to `stop` that have arrived."""
    k = head
    while k < stop and arrival[k] <= now:
        k += 1
    return k - head


@jit
def _in_time(ms: Floats, batch: int, slack: float) -> int:
    """Largest batch, up to this one, that takes no longer than that."""
    while batch > 0 and ms[batch] > slack:
        batch -= 1
    return batch


@jit
def _cut(
    arrival: Integers, head: int, waits: int, now_ms: float, slo: int, most: int, ms: Floats, worth: float
) -> tuple[int, int]:
    """How many of the oldest requests to give up, and the batch to launch then."""
    best, lost, kept = 0.0, waits, 0
    for given_up in range(waits):
        rest = min(most, waits - given_up)
        batch = _in_time(ms, rest, (arrival[head + given_up] + slo) / NS_PER_MS - now_ms)
        if batch > 0 and batch > worth * best * ms[batch]:
            best, lost, kept = batch / ms[batch], given_up, batch
        if batch == rest:
            break
    return lost, kept


@jit
def _give_up(queues: Queues, i: int, requests: int) -> None:
    """Drop the oldest requests of service `i`."""
    for k in range(queues.head[i], queues.head[i] + requests):
        queues.arrival_ms[k] = queues.arrival_ns[k] / NS_PER_MS
        queues.start_ms[k] = queues.finish_ms[k] = np.nan
        queues.launch[k] = -1
        queues.outcome[k] = DROPPED
    queues.head[i] += requests


@jit
def _book(queues: Queues, log: Log, number: int, i: int, batch: int, now: int, until: int, share: float) -> None:
    """Write a launch and what becomes of its requests."""
    start_ms, end_ms, head = now / NS_PER_MS, until / NS_PER_MS, queues.head[i]
    log.service[number], log.batch[number], log.share[number], log.note[number] = i, batch, share, PLANNED
    log.start_ms[number], log.end_ms[number] = start_ms, end_ms
    for k in range(head, head + batch):
        queues.arrival_ms[k] = queues.arrival_ns[k] / NS_PER_MS
        queues.start_ms[k] = start_ms
        queues.finish_ms[k] = end_ms
        queues.launch[k] = number
    queues.head[i] = head + batch


@jit
def _credit(memory: Memory, period: float, now_ms: float, i: int, area: float) -> None:
    """Book GPU%·ms that service `i` received, on pages of one period each."""
    pages, newest, received = memory.pages, memory.newest, memory.received
    while now_ms >= memory.turn_at[0]:  # the oldest page becomes the newest
        newest[0] = newest[0] + 1 if newest[0] + 1 < len(pages) else 0
        for k in range(received.size):
            received[k] -= pages[newest[0], k]
            pages[newest[0], k] = 0.0
        memory.turn_at[0] += period
    pages[newest[0], i] += area
    received[i] += area


@jit
def go_on(queues: Queues, log: Log, rules: Rules, memory: Memory) -> int:
    """Run until the end, or until the log is full."""
    arrival, head, stop, slo, ms = queues.arrival_ns, queues.head, queues.stop, rules.slo, rules.ms
    clock, ready_at, flight, service, until = memory.clock, memory.ready_at, memory.flight, memory.service, memory.until
    services, room, received = head.size, log.batch.size, memory.received
    now, launched_at, number, waiting = clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING]
    again, running, free = clock[AGAIN], clock[RUNNING], memory.free[0]
    queue, waits = np.empty(services, dtype=np.int64), np.empty(services, dtype=np.int64)
    key, first = np.empty(services), np.empty(services, dtype=np.bool_)
    how = DONE
    while waiting > 0 or running > 0:
        if number + services > room:
            how = FULL
            break
        at = 0 if now < 0 else (now if again > 0 else NEVER_NS)  # the policy's first turn is at 0
        for q in range(running):
            at = min(at, until[q])
        if free >= rules.needs:
            for i in range(services):
                if now < ready_at[i] < at:
                    at = ready_at[i]
        if at == NEVER_NS or (running == 0 and at > max(rules.duration, launched_at) + rules.stall):
            break
        if at > LAST_NS:
            how = BROKEN
            break
        now = at
        now_ms = now / NS_PER_MS
        kept, left = 0, running
        for q in range(running):  # batches end, in the order of their launches
            if until[q] == now:
                left -= 1
                flight[service[q]] -= 1
                free = free + rules.share[service[q]] if left > 0 else 100.0
            else:
                service[kept], until[kept] = service[q], until[q]
                kept += 1
        running, n, pressing = left, 0, now_ms
        if running > 0 and rules.greedy.any():
            soonest = until[0]
            for q in range(1, running):
                soonest = min(soonest, until[q])
            pressing = soonest / NS_PER_MS
        for i in range(services):
            if ready_at[i] > now or flight[i] >= rules.copies[i]:
                continue
            waits[i] = _waiting(arrival, head[i], min(stop[i], head[i] + rules.most[i]), now)
            key[i] = (arrival[head[i]] + slo[i]) / NS_PER_MS - ms[i, waits[i]]
            first[i] = rules.fair and key[i] < pressing
            if first[i]:
                key[i] = received[i]
            k = n
            while k > 0:  # insert it among those sorted so far
                j = queue[k - 1]
                if first[i] == first[j]:
                    if key[i] >= key[j]:
                        break
                elif first[j]:
                    break
                queue[k] = j
                k -= 1
            queue[k] = i
            n += 1
        spare, again, room_left = free + rules.epsilon, 0, rules.greedy_pct + rules.epsilon
        for i in range(services):
            if rules.greedy[i]:
                room_left -= flight[i] * rules.share[i]
        for k in range(n):
            i = queue[k]
            share = rules.share[i]
            if share > spare:
                break
            if rules.greedy[i] and share > room_left:
                continue
            batch = _in_time(ms[i], waits[i], (arrival[head[i]] + slo[i]) / NS_PER_MS - now_ms)
            if batch < rules.enough * waits[i]:
                batch = waits[i]
                if rules.drop:
                    all_waiting = _waiting(arrival, head[i], stop[i], now)
                    lost, batch = _cut(arrival, head[i], all_waiting, now_ms, slo[i], rules.most[i], ms[i], rules.worth)
                    _give_up(queues, i, lost)
                    waiting -= lost
            if batch > 0:
                _credit(memory, rules.period, now_ms, i, share * ms[i, batch])
                spare -= share
                room_left -= share if rules.greedy[i] else 0.0
                if batch < waits[i] or waits[i] == rules.most[i]:
                    again = 1
                if share > free + rules.slack or running == until.size:
                    how = BROKEN
                    break
                service[running], until[running] = i, now + rules.cost[i, batch]
                _book(queues, log, number, i, batch, now, until[running], share)
                running += 1
                flight[i] += 1
                free -= share
                waiting -= batch
                number += 1
                launched_at = now
            ready_at[i] = ready(arrival, head[i], stop[i], rules.full[i], rules.wait[i])
        if spare < rules.needs:
            again = 0
        if how == BROKEN:
            break
    clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING] = now, launched_at, number, waiting
    clock[AGAIN], clock[RUNNING], memory.free[0] = again, running, free
    return how

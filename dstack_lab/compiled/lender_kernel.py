"""The loop of `DStack` where lanes are lent, on the arrays of a run.

Reads like `policies/lending.py` with indices for names; share 0 of a service is its own lane, the others
are what it may borrow. Launches in flight are listed in the order of their start. As in `dstack_kernel`, all
that is compiled together lies in one file, and the loop is one long function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dstack_lab.compiled.books import BROKEN, DONE, DROPPED, FULL, LAST_NS, Floats, Integers, Log, Queues
from dstack_lab.compiled.jit import jit
from dstack_lab.compiled.notes import OPPORTUNISTIC, PLANNED
from dstack_lab.state import NEVER_NS, NS_PER_MS

if TYPE_CHECKING:
    from dstack_lab.compiled.lender import Memory, Rules

#: Places in `Memory.clock`, which keeps a run that stops for a longer log.
NOW, LAUNCHED_AT, LAUNCHES, WAITING, RUNNING = range(5)


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
def _loan(
    arrival: Integers, head: Integers, stop: Integers, rules: Rules, memory: Memory, running: int, now: int, free: float, i: int
) -> int:
    """Place of the smallest other share at which all that waits is in time, 0 for none; marks who lends for it."""
    now_ms, flight, gone = now / NS_PER_MS, memory.flight, memory.gone
    batch = _waiting(arrival, head[i], min(stop[i], head[i] + rules.most[i]), now)
    slack = (arrival[head[i]] + rules.slo[i]) / NS_PER_MS - now_ms
    spare = free
    for j in range(head.size):
        if j != i and flight[j] == 0 and not gone[j]:
            spare -= rules.shares[j, 0]
    for r in range(1, rules.places[i]):
        share = rules.shares[i, r]
        if share > free:
            break
        if flight[i] == 0 and share < rules.shares[i, 0]:
            continue
        took = rules.ms[i, r, batch]
        held = took > slack
        for q in range(running):
            held |= memory.service[q] == i and memory.share[q] == share
        if held:
            continue
        missing, end, lenders = share - max(spare, 0.0), now_ms + took, 0
        for k in range(head.size):
            j = rules.widest[k]
            if missing <= 0:
                break
            if j == i or flight[j] > 0 or gone[j]:
                continue
            waits = _waiting(arrival, head[j], min(stop[j], head[j] + rules.most[j]), now)
            deadline = (arrival[head[j]] + rules.slo[j]) / NS_PER_MS if waits else end - took + rules.slo_ms[j]
            later = min(rules.most[j], max(1, int(np.ceil(waits + rules.rate[j] * took))))
            if end + rules.safe * rules.ms[j, 0, later] <= deadline:
                memory.lender[lenders] = j
                lenders += 1
                missing -= rules.shares[j, 0]
        if missing <= 0:
            for k in range(lenders):
                gone[memory.lender[k]] = True
            gone[i] = True
            return r
    return 0


@jit
def _cut(arrival: Integers, first: int, stop: int, rules: Rules, now: int, i: int) -> tuple[int, int]:
    """How many of the oldest requests to give up, and the batch to launch then."""
    waits = _waiting(arrival, first, stop, now)
    best, lost, kept, now_ms, ms = 0.0, waits, 0, now / NS_PER_MS, rules.ms[i, 0]
    for given_up in range(waits):
        rest = min(rules.most[i], waits - given_up)
        batch = _in_time(ms, rest, (arrival[first + given_up] + rules.slo[i]) / NS_PER_MS - now_ms)
        if batch > 0 and batch > rules.worth * best * ms[batch]:
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
def _book(queues: Queues, log: Log, number: int, i: int, batch: int, now: int, until: int, share: float, note: int) -> None:
    """Write a launch and what becomes of its requests."""
    start_ms, end_ms, head = now / NS_PER_MS, until / NS_PER_MS, queues.head[i]
    log.service[number], log.batch[number], log.share[number], log.note[number] = i, batch, share, note
    log.start_ms[number], log.end_ms[number] = start_ms, end_ms
    for k in range(head, head + batch):
        queues.arrival_ms[k] = queues.arrival_ns[k] / NS_PER_MS
        queues.start_ms[k] = start_ms
        queues.finish_ms[k] = end_ms
        queues.launch[k] = number
    queues.head[i] = head + batch


@jit
def go_on(queues: Queues, log: Log, rules: Rules, memory: Memory) -> int:
    """Run until the end, or until the log is full."""
    arrival, head, stop = queues.arrival_ns, queues.head, queues.stop
    clock, ready_at, flight, gone, until = memory.clock, memory.ready_at, memory.flight, memory.gone, memory.until
    services, room = head.size, log.batch.size
    now, launched_at, number, waiting = clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING]
    running, free = clock[RUNNING], memory.free[0]
    plan = np.empty((2 * services, 4), dtype=np.int64)  # launches of a turn: service, place of the share, batch, note
    queue = np.empty(services, dtype=np.int64)
    ends = np.empty(services)
    how = DONE
    while waiting > 0 or running > 0:
        if number + 2 * services > room:
            how = FULL
            break
        at = 0 if now < 0 else NEVER_NS  # the policy's first turn is at 0
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
                flight[memory.service[q]] -= 1
                free = free + memory.share[q] if left > 0 else 100.0
            else:
                memory.service[kept], memory.share[kept], until[kept] = memory.service[q], memory.share[q], until[q]
                kept += 1
        running = left
        launches, spare = 0, free + rules.epsilon
        for i in range(services):
            ends[i], gone[i] = now_ms, False
        for q in range(running):
            ends[memory.service[q]] = max(ends[memory.service[q]], until[q] / NS_PER_MS)
        n = 0
        for i in range(services):
            if ready_at[i] > now or flight[i] >= rules.together:
                continue
            batch, due = (
                _waiting(arrival, head[i], min(stop[i], head[i] + rules.most[i]), now),
                arrival[head[i]] + rules.slo[i],
            )
            if ends[i] + rules.ms[i, 0, batch] > due / NS_PER_MS:
                k = n
                while k > 0 and due < arrival[head[queue[k - 1]]] + rules.slo[queue[k - 1]]:
                    queue[k] = queue[k - 1]
                    k -= 1
                queue[k] = i
                n += 1
        for k in range(n):
            i = queue[k]
            r = _loan(arrival, head, stop, rules, memory, running, now, spare, i)
            if r > 0:
                batch = _waiting(arrival, head[i], min(stop[i], head[i] + rules.most[i]), now)
                plan[launches, 0], plan[launches, 1], plan[launches, 2], plan[launches, 3] = i, r, batch, OPPORTUNISTIC
                launches += 1
                spare -= rules.shares[i, r]
        for i in range(services):
            if ready_at[i] > now or flight[i] > 0 or gone[i] or rules.shares[i, 0] > spare:
                continue
            waits = _waiting(arrival, head[i], min(stop[i], head[i] + rules.most[i]), now)
            batch = _in_time(rules.ms[i, 0], waits, (arrival[head[i]] + rules.slo[i]) / NS_PER_MS - now_ms)
            if batch < rules.enough * waits:
                if rules.drop:
                    lost, batch = _cut(arrival, head[i], stop[i], rules, now, i)
                    _give_up(queues, i, lost)
                    waiting -= lost
                    if lost > 0 and batch == 0:
                        ready_at[i] = _ready(arrival, head[i], stop[i], rules.full[i], rules.wait[i])
                else:
                    batch = max(batch, min(waits, rules.batch[i])) if batch > 0 else waits
            if batch > 0:
                plan[launches, 0], plan[launches, 1], plan[launches, 2], plan[launches, 3] = i, 0, batch, PLANNED
                launches += 1
                spare -= rules.shares[i, 0]
        for k in range(launches):
            i, r, batch, note = plan[k]
            share = rules.shares[i, r]
            if share > free + rules.slack:
                how = BROKEN
            memory.service[running], memory.share[running], until[running] = i, share, now + rules.cost[i, r, batch]
            _book(queues, log, number, i, batch, now, until[running], share, note)
            ready_at[i] = _ready(arrival, head[i], stop[i], rules.full[i], rules.wait[i])
            running += 1
            flight[i] += 1
            free -= share
            waiting -= batch
            number += 1
            launched_at = now
        if how == BROKEN:
            break
    clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING] = now, launched_at, number, waiting
    clock[RUNNING], memory.free[0] = running, free
    return how


@jit
def _ready(arrival: Integers, head: int, stop: int, full: int, wait: int) -> int:
    """When a batch is full or its oldest request has waited."""
    if head >= stop:
        return NEVER_NS
    at = arrival[head + full - 1] if head + full <= stop else NEVER_NS
    return min(at, arrival[head] + wait)  # type: ignore[no-any-return]

"""The loop of `DStack`: its calendar, scoreboard, ladders and batch rule, on the arrays of a run.

Reads like `policies/dstack.py` with indices for names: `own` is the share of a service's windows and
`rung` a place in its ladder of shares, the last of which is `own`. A service has one launch in flight
at most, so `until` says when it ends (0: none). Sums of shares are taken in the order of the Python
policy, for the same rounding.

All that is compiled together lies in this file, and what policies may come to change is an argument:
numba's cache compiles anew when a file changes, but not when another does that it imports. The loop is
one long function because numba counts the users of every array that is passed to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dstack_lab.compiled.books import BROKEN, DONE, DROPPED, FULL, LAST_NS, Floats, Integers, Log, Queues
from dstack_lab.compiled.jit import jit
from dstack_lab.compiled.notes import OPPORTUNISTIC, PLANNED
from dstack_lab.state import NEVER_NS, NS_PER_MS

if TYPE_CHECKING:
    from dstack_lab.compiled.dstack import Memory, Rules

#: Places in `Memory.clock` and in `Memory.level`, which keep a run that stops for a longer log.
NOW, LAUNCHED_AT, LAUNCHES, WAITING, RUNNING, CURSOR, BLOCKED, WAKES = range(8)
FREE, BEGAN, WOKEN = range(3)


@jit
def ready(arrival: Integers, head: int, stop: int, full: int, wait: int) -> int:
    """When a batch is full or its oldest request has waited."""
    if head >= stop:
        return NEVER_NS
    at = arrival[head + full - 1] if head + full <= stop else NEVER_NS
    return min(at, arrival[head] + wait)  # type: ignore[no-any-return]


@jit
def _batch(times: Integers, head: int, stop: int, now: int, full: int, most: int, slo: int, ms: Floats, i: int, r: int) -> int:
    """All that waits up to the planned batch; more of it if the oldest request is still in time."""
    k, end = head, min(head + full, stop)
    while k < end and times[k] <= now:
        k += 1
    if k - head == full:
        end = min(head + most, stop)
        while k < end and times[k] <= now:
            k += 1
        limit = (times[head] + slo) / NS_PER_MS - now / NS_PER_MS
        while k - head > full and ms[i, r, k - head] > limit:
            k -= 1
    return k - head


@jit
def _fits(rules: Rules, memory: Memory, cursor: int, began: float, running: int, i: int, share: float, end: float) -> int:
    """Whether a launch that ends at `end` leaves every planned window until then its share: 0 or 1, 2 if there is no telling."""
    ahead, owner, until = memory.ahead, memory.ahead_owner, memory.until
    n = 0
    while True:
        start = began + rules.start[cursor]
        if start >= end - rules.epsilon:
            break
        if rules.owner[cursor] != i:
            if n == owner.size:
                return 2
            ahead[n, 0], ahead[n, 1], owner[n] = start, began + rules.end[cursor], rules.owner[cursor]
            n += 1
        cursor += 1
        if cursor == rules.owner.size:
            cursor, began = 0, began + rules.period
    for a in range(n):
        start = ahead[a, 0]
        if a > 0 and start == ahead[a - 1, 0]:
            continue
        at = start * NS_PER_MS + 0.5
        reserved = held = 0.0
        for b in range(n):
            if ahead[b, 0] <= start < ahead[b, 1] and not until[owner[b]] > at:
                reserved += rules.own[owner[b]]
        for r in range(running):
            if until[memory.order[r]] > at:
                held += memory.share[memory.order[r]]
        if reserved + share + held > 100 + rules.epsilon:
            return 0
    return 1


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
def _book(queues: Queues, log: Log, number: int, i: int, batch: int, now: int, until: int, share: float, note: int) -> None:
    """Write a launch and what becomes of its requests."""
    start_ms, end_ms = now / NS_PER_MS, until / NS_PER_MS
    log.service[number], log.batch[number], log.share[number], log.note[number] = i, batch, share, note
    log.start_ms[number], log.end_ms[number] = start_ms, end_ms
    head = queues.head[i]
    for k in range(head, head + batch):
        queues.arrival_ms[k] = queues.arrival_ns[k] / NS_PER_MS
        queues.start_ms[k] = start_ms
        queues.finish_ms[k] = end_ms
        queues.launch[k] = number
    queues.head[i] = head + batch


@jit
def _drop(queues: Queues, i: int, last: int) -> int:
    """Give up requests that arrived until `last`; return how many."""
    first = k = queues.head[i]
    while k < queues.stop[i] and queues.arrival_ns[k] <= last:
        queues.arrival_ms[k] = queues.arrival_ns[k] / NS_PER_MS
        queues.start_ms[k] = queues.finish_ms[k] = np.nan
        queues.launch[k] = -1
        queues.outcome[k] = DROPPED
        k += 1
    queues.head[i] = k
    return k - first  # type: ignore[no-any-return]


@jit
def go_on(queues: Queues, log: Log, rules: Rules, memory: Memory) -> int:
    """Run until the end, or until the log is full."""
    arrival, head, stop = queues.arrival_ns, queues.head, queues.stop
    clock, level, ready_at, until, order = memory.clock, memory.level, memory.ready_at, memory.until, memory.order
    own, slo, ms, received, blocked, wakes = rules.own, rules.slo, rules.ms, memory.received, memory.blocked, memory.wakes
    services, windows, room, owner = head.size, rules.owner.size, log.batch.size, memory.blocked_owner
    now, launched_at, number, waiting = clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING]
    running, cursor, held_back, woken_ahead = clock[RUNNING], clock[CURSOR], clock[BLOCKED], clock[WAKES]
    free, began, woken = level[FREE], level[BEGAN], level[WOKEN]
    upcoming = began + rules.start[cursor]
    chosen = np.zeros(services, dtype=np.bool_)
    plan = np.empty((services, 4), dtype=np.int64)  # launches of a turn: service, rung, batch, note
    queue = np.empty(services, dtype=np.int64)
    how = DONE
    while waiting > 0 or running > 0:
        if number + services > room:
            how = FULL
            break
        at = NEVER_NS
        for r in range(running):
            at = min(at, until[order[r]])
        for w in range(woken_ahead):
            at = min(at, wakes[w])
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
        for r in range(running):  # batches end, in the order of their launches
            i = order[r]
            if until[i] == now:
                left -= 1
                until[i] = 0
                free = free + memory.share[i] if left > 0 else 100.0
            else:
                order[kept] = i
                kept += 1
        running, kept = left, 0
        for w in range(woken_ahead):
            if wakes[w] != now:
                wakes[kept] = wakes[w]
                kept += 1
        woken_ahead = kept
        if rules.reject:
            gone = 0
            for i in range(services):
                last = min(now + rules.margin[i], now)
                if head[i] < stop[i] and arrival[head[i]] <= last:
                    gone += _drop(queues, i, last)
                    ready_at[i] = ready(arrival, head[i], stop[i], rules.full[i], rules.wait[i])
            if gone > 0:
                waiting -= gone
                if woken_ahead == wakes.size:
                    how = BROKEN
                    break
                wakes[woken_ahead] = now
                woken_ahead += 1
                continue
        launches, taken = 0, 0.0
        if rules.planned and (held_back > 0 or upcoming <= now_ms + rules.epsilon):
            horizon, total = now_ms + 2 * rules.epsilon - rules.epsilon, held_back
            while upcoming < horizon and total < owner.size:
                owner[total] = rules.owner[cursor]
                blocked[total, 0], blocked[total, 1] = began + rules.end[cursor], began + rules.next_end[cursor]
                total += 1
                cursor += 1
                if cursor == windows:
                    cursor, began = 0, began + rules.period
                upcoming = began + rules.start[cursor]
            if upcoming < horizon:
                how = BROKEN
                break
            held_back = 0
            for w in range(total):
                i, rung = owner[w], rules.rungs[owner[w]] - 1
                if until[i] > 0 or chosen[i]:
                    continue
                batch = _batch(arrival, head[i], stop[i], now, rules.batch[i], rules.most[i], slo[i], ms, i, rung)
                if batch == 0 or (ready_at[i] > now and (arrival[head[i]] + slo[i]) / NS_PER_MS >= blocked[w, 1]):
                    continue
                if own[i] <= free - taken + rules.epsilon:
                    _credit(memory, rules.period, now_ms, i, own[i] * ms[i, rung, batch])
                    plan[launches, 0], plan[launches, 1], plan[launches, 2], plan[launches, 3] = i, rung, batch, PLANNED
                    launches += 1
                    taken += own[i]
                    chosen[i] = True
                elif now_ms < blocked[w, 0]:
                    owner[held_back] = i
                    blocked[held_back, 0], blocked[held_back, 1] = blocked[w, 0], blocked[w, 1]
                    held_back += 1
        if rules.opportunistic and free >= rules.needs:
            n = 0
            for i in range(services):
                if ready_at[i] <= now and until[i] == 0 and not chosen[i]:
                    due, k = arrival[head[i]] + slo[i], n
                    while k > 0:  # insert it among those sorted so far
                        j = queue[k - 1]
                        if rules.fair and received[i] != received[j]:
                            if received[i] > received[j]:
                                break
                        elif due >= arrival[head[j]] + slo[j]:
                            break
                        queue[k] = j
                        k -= 1
                    queue[k] = i
                    n += 1
            others = reserved = 0.0
            for k in range(n):
                others += own[queue[k]]
            for w in range(held_back):
                reserved += own[owner[w]]
            spare = free - taken - reserved + rules.epsilon
            for k in range(n):
                i = queue[k]
                others -= own[i]
                for rung in range(rules.rungs[i]):
                    share = rules.ladder[i, rung]
                    if share > (spare - others if share > own[i] else spare):
                        continue
                    batch = _batch(arrival, head[i], stop[i], now, rules.batch[i], rules.most[i], slo[i], ms, i, rung)
                    end = now_ms + ms[i, rung, batch]
                    if rules.planned and upcoming < end:
                        clear = False
                        if rules.side_by_side:
                            idle = 0.0
                            for j in range(services):
                                idle += own[j] if until[j] == 0 and j != i else 0.0
                            clear = idle + (share + taken) <= free
                        if not clear:
                            fits = _fits(rules, memory, cursor, began, running, i, share + taken, end)
                            if fits == 2:
                                how = BROKEN
                            if fits != 1:
                                continue
                    _credit(memory, rules.period, now_ms, i, share * ms[i, rung, batch])
                    plan[launches, 0], plan[launches, 1], plan[launches, 2], plan[launches, 3] = i, rung, batch, OPPORTUNISTIC
                    launches += 1
                    taken += share
                    spare -= share
                    break
        for k in range(launches):
            i, rung, batch, note = plan[k]
            share = rules.ladder[i, rung]
            if share > free + rules.slack:
                how = BROKEN
            until[i] = now + rules.cost[i, rung, batch]
            _book(queues, log, number, i, batch, now, until[i], share, note)
            ready_at[i] = ready(arrival, head[i], stop[i], rules.full[i], rules.wait[i])
            memory.share[i], order[running] = share, i
            running += 1
            free -= share
            waiting -= batch
            number += 1
            chosen[i], launched_at = False, now
        if rules.planned and upcoming > woken:
            woken = upcoming
            at = int(np.rint(woken * NS_PER_MS))
            if at < now or woken_ahead == wakes.size:
                how = BROKEN
            else:
                wakes[woken_ahead] = at
                woken_ahead += 1
        if how == BROKEN:
            break
    clock[NOW], clock[LAUNCHED_AT], clock[LAUNCHES], clock[WAITING] = now, launched_at, number, waiting
    clock[RUNNING], clock[CURSOR], clock[BLOCKED], clock[WAKES] = running, cursor, held_back, woken_ahead
    level[FREE], level[BEGAN], level[WOKEN] = free, began, woken
    return how

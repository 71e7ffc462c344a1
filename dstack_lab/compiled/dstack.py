"""`DStack` compiled: the period plan that Python made, as arrays for `dstack_kernel`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dstack_lab.compiled import slots
from dstack_lab.compiled.books import FULL, Books, Floats, Integers, Outcome, Queues
from dstack_lab.compiled.dstack_kernel import LAUNCHES, NOW, WAITING, WAKES, go_on, ready
from dstack_lab.compiled.notes import coded
from dstack_lab.ledger import SHARE_SLACK
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.slots import MEMORY
from dstack_lab.policies.windows import EPSILON
from dstack_lab.state import NS_PER_MS

#: Wake-ups that can be ahead at once: one for the next window, and rarely a second.
MOST_WAKES = 8


class Rules(NamedTuple):
    """What does not change in a run; arrays are by service, those of windows by window."""

    slo: Integers
    wait: Integers
    full: Integers  # batch that counts as ready
    most: Integers
    batch: Integers
    margin: Integers  # a request that arrived before now + this is lost
    own: Floats
    rungs: Integers
    ladder: Floats  # service, rung
    ms: Floats  # service, rung, batch
    cost: Integers  # the same in whole nanoseconds
    start: Floats
    end: Floats
    next_end: Floats
    owner: Integers
    period: float
    needs: float
    epsilon: float
    slack: float
    planned: bool
    opportunistic: bool
    fair: bool
    reject: bool
    side_by_side: bool
    duration: int
    stall: int


class Memory(NamedTuple):
    """What changes from turn to turn."""

    clock: Integers
    level: Floats
    ready_at: Integers
    until: Integers
    share: Floats  # of the launch in flight
    order: Integers  # services in flight, in the order of their launches
    wakes: Integers
    blocked: Floats  # window, (end, next end)
    blocked_owner: Integers
    received: Floats
    pages: Floats  # period, service
    newest: Integers  # page
    turn_at: Floats  # when the next page begins
    ahead: Floats  # room to list windows: (start, end)
    ahead_owner: Integers


def run(policy: DStack, books: Books, slo_ns: Integers, wait_ns: Integers, duration_ns: int, stall_ns: int) -> Outcome:
    """Run to the end; return how that went (`DONE` or `BROKEN`), the number of launches and the notes by code."""
    if policy.keeper is not None:
        return slots.run(policy.keeper, books, slo_ns, wait_ns, duration_ns, stall_ns)
    rules = _rules(policy, books, slo_ns, wait_ns, duration_ns, stall_ns)
    memory = _memory(books.queues, rules)
    while (how := go_on(books.queues, books.log, rules, memory)) == FULL:
        books.resize()
    launches = int(memory.clock[LAUNCHES])
    return how, launches, coded(books.log.note[:launches])


def _rules(policy: DStack, books: Books, slo_ns: Integers, wait_ns: Integers, duration_ns: int, stall_ns: int) -> Rules:
    plan, names = books.plan, [s.name for s in books.plan.services]
    points, ladders = [policy.point[n] for n in names], [policy.ladder[n] for n in names]
    size = (len(names), max(map(len, ladders)))
    ladder, widest = np.zeros(size), max(t.batch_max for t in plan.tables)
    ms, cost = np.zeros((*size, widest + 1)), np.zeros((*size, widest + 1), dtype=np.int64)
    for i, (shares, table) in enumerate(zip(ladders, plan.tables, strict=True)):
        for r, share in enumerate(shares):
            ladder[i, r] = share
            for b in range(1, table.batch_max + 1):
                ms[i, r, b] = table.at(b, share)
                cost[i, r, b] = max(1, round(ms[i, r, b].item() * NS_PER_MS))
    planned = [round(p.service_ms * NS_PER_MS) for p in points]
    windows = policy.calendar.windows
    return Rules(
        slo=slo_ns,
        wait=wait_ns,
        full=np.array([a.batch for a in plan.allocations], dtype=np.int64),
        most=np.array([t.batch_max for t in plan.tables], dtype=np.int64),
        batch=np.array([p.batch for p in points], dtype=np.int64),
        margin=np.array(planned, dtype=np.int64) - slo_ns - 1,
        own=np.array([p.gpu_pct for p in points], dtype=np.float64),
        rungs=np.array([len(shares) for shares in ladders], dtype=np.int64),
        ladder=ladder,
        ms=ms,
        cost=cost,
        start=np.array([w.start_ms for w in windows], dtype=np.float64),
        end=np.array([w.end_ms for w in windows], dtype=np.float64),
        next_end=np.array([w.next_end_ms for w in windows], dtype=np.float64),
        owner=np.array([names.index(w.service) for w in windows], dtype=np.int64),
        period=float(policy.scores.period_ms),
        needs=float(policy.needs_pct),
        epsilon=EPSILON,
        slack=SHARE_SLACK,
        planned=bool(policy.planned),
        opportunistic=bool(policy.opportunistic),
        fair=bool(policy.fair),
        reject=bool(policy.reject),
        side_by_side=bool(policy.side_by_side),
        duration=duration_ns,
        stall=stall_ns,
    )


def _memory(queues: Queues, rules: Rules) -> Memory:
    services, room, whole = queues.head.size, 4 * rules.owner.size + 16, np.int64
    heads = zip(queues.head, queues.stop, rules.full, rules.wait, strict=True)
    clock = np.zeros(WAKES + 1, dtype=whole)
    clock[NOW], clock[WAITING], clock[WAKES] = -1, queues.arrival_ns.size, 1  # the policy's first turn is at 0
    return Memory(
        clock=clock,
        level=np.array([100.0, 0.0, -1.0]),
        ready_at=np.array([ready(queues.arrival_ns, *row) for row in heads], dtype=whole),
        until=np.zeros(services, dtype=whole),
        share=np.zeros(services),
        order=np.zeros(services, dtype=whole),
        wakes=np.zeros(MOST_WAKES, dtype=whole),
        blocked=np.zeros((room, 2)),
        blocked_owner=np.zeros(room, dtype=whole),
        received=np.zeros(services),
        pages=np.zeros((MEMORY, services)),
        newest=np.zeros(1, dtype=whole),
        turn_at=np.array([rules.period]),
        ahead=np.zeros((room, 2)),
        ahead_owner=np.zeros(room, dtype=whole),
    )

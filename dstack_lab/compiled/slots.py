"""`DStack` compiled where the GPU is cut into slots: the cut that Python chose, as arrays for `slots_kernel`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dstack_lab.compiled.books import FULL, Books, Floats, Integers, Outcome, Queues
from dstack_lab.compiled.notes import coded
from dstack_lab.compiled.slots_kernel import LAUNCHES, NOW, RUNNING, WAITING, go_on, ready
from dstack_lab.ledger import SHARE_SLACK
from dstack_lab.policies.slots import ENOUGH, EPSILON, MEMORY, SlotKeeper
from dstack_lab.state import NS_PER_MS


class Rules(NamedTuple):
    """What does not change in a run; arrays are by service."""

    slo: Integers
    wait: Integers
    full: Integers  # batch that counts as ready
    most: Integers
    share: Floats
    copies: Integers
    greedy: np.typing.NDArray[np.bool_]
    ms: Floats  # service, batch: as the policy expects it
    cost: Integers  # as it is alone, in whole nanoseconds
    period: float
    needs: float
    epsilon: float
    slack: float
    enough: float
    worth: float
    drop: bool
    fair: bool
    greedy_pct: float
    duration: int
    stall: int


class Memory(NamedTuple):
    """What changes from turn to turn."""

    clock: Integers
    free: Floats
    ready_at: Integers
    flight: Integers  # launches of each service
    service: Integers  # of each launch in flight, as the next one
    until: Integers
    received: Floats
    pages: Floats  # period, service
    newest: Integers  # page
    turn_at: Floats  # when the next page begins


def run(keeper: SlotKeeper, books: Books, slo_ns: Integers, wait_ns: Integers, duration_ns: int, stall_ns: int) -> Outcome:
    """Run to the end; return how that went (`DONE` or `BROKEN`), the number of launches and the notes by code."""
    rules = _rules(keeper, books, slo_ns, wait_ns, duration_ns, stall_ns)
    memory = _memory(books.queues, rules)
    while (how := go_on(books.queues, books.log, rules, memory)) == FULL:
        books.resize()
    launches = int(memory.clock[LAUNCHES])
    return how, launches, coded(books.log.note[:launches])


def _rules(keeper: SlotKeeper, books: Books, slo_ns: Integers, wait_ns: Integers, duration_ns: int, stall_ns: int) -> Rules:
    plan = books.plan
    widest = max(t.batch_max for t in plan.tables)
    ms, cost = np.zeros((len(plan.tables), widest + 1)), np.zeros((len(plan.tables), widest + 1), dtype=np.int64)
    for i, (share, table, times) in enumerate(zip(keeper.slots.gpu_pct, plan.tables, keeper.times, strict=True)):
        ms[i, : len(times)] = times
        cost[i, 1 : len(times)] = [max(1, round(table.at(b, share) * NS_PER_MS)) for b in range(1, len(times))]
    return Rules(
        slo=slo_ns,
        wait=wait_ns,
        full=np.array([a.batch for a in plan.allocations], dtype=np.int64),
        most=np.array([t.batch_max for t in plan.tables], dtype=np.int64),
        share=np.array(keeper.slots.gpu_pct, dtype=np.float64),
        copies=np.array(keeper.copies, dtype=np.int64),
        greedy=np.array(keeper.slots.greedy, dtype=np.bool_),
        ms=ms,
        cost=cost,
        period=float(keeper.scores.period_ms),
        needs=float(keeper.needs_pct),
        epsilon=EPSILON,
        slack=SHARE_SLACK,
        enough=ENOUGH,
        worth=float(keeper.slots.worth),
        drop=bool(keeper.drop),
        fair=bool(keeper.fair),
        greedy_pct=float(keeper.slots.greedy_pct),
        duration=duration_ns,
        stall=stall_ns,
    )


def _memory(queues: Queues, rules: Rules) -> Memory:
    services, most, whole = queues.head.size, int((100 + EPSILON) // rules.share.min()) + 1, np.int64
    clock = np.zeros(RUNNING + 1, dtype=whole)
    clock[NOW], clock[WAITING] = -1, queues.arrival_ns.size
    heads = zip(queues.head, queues.stop, rules.full, rules.wait, strict=True)
    return Memory(
        clock=clock,
        free=np.array([100.0]),
        ready_at=np.array([ready(queues.arrival_ns, *row) for row in heads], dtype=whole),
        flight=np.zeros(services, dtype=whole),
        service=np.zeros(most, dtype=whole),
        until=np.zeros(most, dtype=whole),
        received=np.zeros(services),
        pages=np.zeros((MEMORY, services)),
        newest=np.zeros(1, dtype=whole),
        turn_at=np.array([rules.period]),
    )

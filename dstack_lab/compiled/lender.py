"""`DStack` compiled where lanes are lent: the lanes that Python chose, as arrays for `lender_kernel`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dstack_lab.compiled.books import FULL, Books, Floats, Integers, Outcome, Queues
from dstack_lab.compiled.lender_kernel import LAUNCHES, NOW, RUNNING, WAITING, go_on
from dstack_lab.compiled.notes import coded
from dstack_lab.ledger import SHARE_SLACK
from dstack_lab.policies.lending import ENOUGH, MOST, SAFE, WORTH, LaneLender
from dstack_lab.policies.windows import EPSILON
from dstack_lab.state import NEVER_NS, NS_PER_MS


class Rules(NamedTuple):
    """What does not change in a run; arrays are by service."""

    slo: Integers
    slo_ms: Floats
    wait: Integers
    full: Integers  # batch that counts as ready
    most: Integers
    batch: Integers
    rate: Floats  # per ms
    shares: Floats  # service, place: the own lane's first
    places: Integers  # how many of them
    ms: Floats  # service, place, batch
    cost: Integers  # the same in whole nanoseconds
    widest: Integers  # services, the widest lane first
    drop: bool
    needs: float
    epsilon: float
    slack: float
    enough: float
    worth: float
    safe: float
    together: int
    duration: int
    stall: int


class Memory(NamedTuple):
    """What changes from turn to turn."""

    clock: Integers
    free: Floats
    ready_at: Integers
    flight: Integers  # launches of each service
    service: Integers  # of each launch in flight, as the next two
    share: Floats
    until: Integers
    gone: np.typing.NDArray[np.bool_]  # by service, in a turn: lent its lane, or borrowed
    lender: Integers


def run(keeper: LaneLender, books: Books, slo_ns: Integers, wait_ns: Integers, duration_ns: int, stall_ns: int) -> Outcome:
    """Run to the end; return how that went (`DONE` or `BROKEN`), the number of launches and the notes by code."""
    rules = _rules(keeper, books, slo_ns, wait_ns, duration_ns, stall_ns)
    memory = _memory(books.queues, rules)
    while (how := go_on(books.queues, books.log, rules, memory)) == FULL:
        books.resize()
    launches = int(memory.clock[LAUNCHES])
    return how, launches, coded(books.log.note[:launches])


def _rules(keeper: LaneLender, books: Books, slo_ns: Integers, wait_ns: Integers, duration_ns: int, stall_ns: int) -> Rules:
    plan = books.plan
    rows = [(own, *others) for own, others in zip(keeper.own, keeper.others, strict=True)]
    size = (len(rows), max(map(len, rows)))
    shares, widest = np.zeros(size), max(t.batch_max for t in plan.tables)
    ms, cost = np.zeros((*size, widest + 1)), np.zeros((*size, widest + 1), dtype=np.int64)
    for i, (row, table) in enumerate(zip(rows, plan.tables, strict=True)):
        for r, share in enumerate(row):
            shares[i, r] = share
            for b in range(1, table.batch_max + 1):
                ms[i, r, b] = table.at(b, share)
                cost[i, r, b] = max(1, round(ms[i, r, b].item() * NS_PER_MS))
    return Rules(
        slo=slo_ns,
        slo_ms=np.array([s.slo_ms for s in plan.services], dtype=np.float64),
        wait=wait_ns,
        full=np.array([a.batch for a in plan.allocations], dtype=np.int64),
        most=np.array([t.batch_max for t in plan.tables], dtype=np.int64),
        batch=np.array([keeper.points[s.name].batch for s in plan.services], dtype=np.int64),
        rate=np.array(keeper.rates, dtype=np.float64),
        shares=shares,
        places=np.array([len(row) for row in rows], dtype=np.int64),
        ms=ms,
        cost=cost,
        widest=np.lexsort((np.arange(len(rows)), -shares[:, 0])),
        drop=keeper.drop,
        needs=float(keeper.needs_pct),
        epsilon=EPSILON,
        slack=SHARE_SLACK,
        enough=ENOUGH,
        worth=WORTH,
        safe=SAFE,
        together=MOST,
        duration=duration_ns,
        stall=stall_ns,
    )


def _memory(queues: Queues, rules: Rules) -> Memory:
    services, whole = queues.head.size, np.int64
    clock = np.zeros(RUNNING + 1, dtype=whole)
    clock[NOW], clock[WAITING] = -1, queues.arrival_ns.size
    ready = np.full(services, NEVER_NS, dtype=whole)
    for i, (head, stop) in enumerate(zip(queues.head, queues.stop, strict=True)):
        if head < stop:
            full = queues.arrival_ns[head + rules.full[i] - 1] if head + rules.full[i] <= stop else NEVER_NS
            ready[i] = min(full, queues.arrival_ns[head] + rules.wait[i])
    return Memory(
        clock=clock,
        free=np.array([100.0]),
        ready_at=ready,
        flight=np.zeros(services, dtype=whole),
        service=np.zeros(2 * services, dtype=whole),
        share=np.zeros(2 * services),
        until=np.zeros(2 * services, dtype=whole),
        gone=np.zeros(services, dtype=np.bool_),
        lender=np.zeros(services, dtype=whole),
    )

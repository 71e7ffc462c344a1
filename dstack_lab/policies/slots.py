"""Equal slots at run time: the GPU is cut into parts that any service may use, and who has to begin first begins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import pandas as pd

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, ServiceView, Wake
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.services import Plan
from dstack_lab.state import INFINITE, NS_PER_MS

#: A batch is launched for its oldest request if it is at least this part of what waits; else some are better given up.
ENOUGH = 0.8
#: The scoreboard remembers this many periods.
MEMORY = 10
#: Room for the rounding of sums of shares [GPU%].
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Slots:
    """How a GPU is cut; tuples are by service.

    Parameters
    ----------
    services : tuple of str
    count : int
        Slots side by side.
    gpu_pct : tuple of float
        Share of each service's launches: a slot's, or a wider one if a request alone needs that for its SLO.
    copies : tuple of int
        Most launches of each service at once.
    greedy : tuple of bool
        Who asks for more than a fair part of a GPU that cannot serve all; nobody within the bound.
    greedy_pct : float
        GPU% that the greedy hold together, at most: the rest is left to the others.
    wait_part : float
        Part of its SLO that the oldest request of an unfilled batch waits for company.
    worth : float
        One more request is given up only if the batch that is left is served faster, per request, by this factor.
    slowdown : tuple of float
        Time beside launches in all other slots over time alone.
    late : tuple of float
        Part of the requests that was late or given up in the trial that these slots were chosen by.
    """

    services: tuple[str, ...]
    count: int
    gpu_pct: tuple[float, ...]
    copies: tuple[int, ...]
    greedy: tuple[bool, ...]
    greedy_pct: float
    wait_part: float
    worth: float
    slowdown: tuple[float, ...]
    late: tuple[float, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """Return one row per service, in the columns' names and order; the slots' number stands in each."""
        return pd.DataFrame({field.name: getattr(self, field.name) for field in fields(self)})


class SlotKeeper:
    """Launch whatever waits in any slot that is free.

    1. *Order*: services with a ready batch begin in the order of the instant at which all that waits has to begin to
       be in time. Who should have begun already comes first (in a crowd, who cannot wait for the next launch to end);
       if that is several, the one that received least GPU%·ms over the last 10 periods: where not all can be in
       time, all lose alike.
       Beyond the bound the greedy leave the others room.
    2. *Batch*: all that waits, or as much as its oldest request can wait for. If that is little, the oldest are
       given up until what is left is served fastest, request by request.

    Parameters
    ----------
    plan : Plan
    slots : Slots
    drop : bool
        Give up requests. Without it all that waits is launched, in time or not.
    fair : bool
        Whether the scoreboard decides among those who should have begun already; if not, who should have begun first.
    copies : int, optional
        Most launches of one service at once, if less than those of `slots`.
    """

    def __init__(self, plan: Plan, slots: Slots, drop: bool, fair: bool = True, copies: int | None = None) -> None:
        self.slots, self.drop, self.fair = slots, drop, fair
        self.copies = [n if copies is None else min(n, copies) for n in slots.copies]
        self.crowded = any(slots.greedy)
        self.needs_pct = min(slots.gpu_pct) - EPSILON
        columns = zip(plan.tables, slots.gpu_pct, slots.slowdown, strict=True)
        #: By service and batch, beside all others [ms].
        self.times = [rising([slow * t.at(b, share) for b in range(1, t.batch_max + 1)]) for t, share, slow in columns]
        self.scores = Scoreboard(slots.services, max(s.slo_ms for s in plan.services), MEMORY)

    def decide(self, state: GpuState) -> list[Decision]:
        """Fill what is free; whoever comes first is waited for if it does not fit."""
        now, received, times, copies = state.now_ms, self.scores.received, self.times, self.copies
        pressing = now
        if self.crowded:
            pressing = min([end for *_, end in state._running.values()], default=state.now_ns) / NS_PER_MS
        ready = []
        for view in state.services:
            if view.ready and view.in_flight < copies[view.index]:
                waits = view.queued(view.batch_max)
                begin = view.due_ms - times[view.index][waits]
                first = self.fair and begin < pressing
                ready.append((not first, received[view.name] if first else begin, view.index, view, waits))
        if len(ready) > 1:
            ready.sort()
        decisions: list[Decision] = []
        free, again = state.free_pct + EPSILON, False
        left = self._left(state) if self.crowded else INFINITE
        for _, _, index, view, waits in ready:
            share = self.slots.gpu_pct[index]
            if share > free:
                break
            if share > left and self.slots.greedy[index]:
                continue
            lost, batch = self._batch(view, waits, now)
            if lost:
                decisions.append(Drop(view.name, lost))
            if batch:
                self.scores.add(now, view.name, share * times[index][batch])
                decisions.append(Launch(view.name, share, batch, "planned"))
                free -= share
                if self.slots.greedy[index]:
                    left -= share
                again = again or batch < waits or waits == view.batch_max
        if again and free >= self.needs_pct:
            decisions.append(Wake(now))  # what is left of a queue may begin beside it
        return decisions

    def _left(self, state: GpuState) -> float:
        """GPU% that the greedy may still take."""
        left = self.slots.greedy_pct + EPSILON
        for view, share, greedy in zip(state.services, self.slots.gpu_pct, self.slots.greedy, strict=True):
            if greedy:
                left -= view.in_flight * share
        return left

    def _batch(self, view: ServiceView, waits: int, now: float) -> tuple[int, int]:
        """How many of the oldest requests to give up, and the batch to launch then: none if all are lost."""
        times = self.times[view.index]
        batch = in_time(times, waits, view.due_ms - now)
        if batch >= ENOUGH * waits:
            return 0, batch
        return cut(times, view.waiting, now, view.deadline_ms, self.slots.worth) if self.drop else (0, waits)


def rising(times_ms: Sequence[float]) -> list[float]:
    """Service times by batch, from a batch of 0 on, that never fall: a larger batch is done no sooner."""
    return list(accumulate([0.0, *times_ms], max))


def in_time(times: list[float], batch: int, slack_ms: float) -> int:
    """Largest batch, up to this one, that takes no longer than that."""
    return bisect_right(times, slack_ms, 1, batch + 1) - 1


def cut(times: list[float], waits: int, now: float, deadline_ms: Callable[[int], float], worth: float) -> tuple[int, int]:
    """How many of the oldest to give up for the batch that is served fastest, and that batch; all and 0 if all are lost."""
    most = len(times) - 1
    best, lost, kept = 0.0, waits, 0
    for given_up in range(waits):
        rest = min(most, waits - given_up)
        batch = in_time(times, rest, deadline_ms(given_up) - now)
        if batch and batch > worth * best * times[batch]:
            best, lost, kept = batch / times[batch], given_up, batch
        if batch == rest:
            break
    return lost, kept

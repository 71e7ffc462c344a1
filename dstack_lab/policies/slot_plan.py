"""Into how many slots to cut a GPU, and how long to wait for company: by trial, on requests drawn at the plan's rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd

from dstack_lab.checks import instance
from dstack_lab.contention import Contention, Load
from dstack_lab.policies.fair_parts import demands, fair_parts
from dstack_lab.policies.slot_trial import Rider, late_in_slots
from dstack_lab.policies.slots import EPSILON, Slots, in_time, rising
from dstack_lab.services import InfeasiblePlan, Plan

#: Most slots that are tried.
MOST_SLOTS = 12
#: Parts of the SLO that the oldest request may wait for company, and what one more request given up has to be worth.
WAITS, WORTHS = (0.1, 0.0, 0.05, 0.15, 0.2, 0.3), (1.02, 1.1)
#: How many times what the others ask for is kept free of the greedy.
ROOMS = (0.0, 1.0, 1.5, 2.0, 3.0)
#: Trials are made at this many times the rates: what only just holds in one draw is no plan.
MARGIN = 1.03
#: Requests are drawn for so many of the rarest service, for this many periods at least and at most, and in all.
RAREST, PERIODS, IN_ALL = 600, (30, 100), 150_000
#: Parts of the draw that the first, second and last trials see, and how many ways go on from each.
PARTS, BEST = (0.25, 0.5, 1.0), 3
#: What counts beside the late part of all requests: that of the service that suffers most, and mean latency over SLO.
WORST, TIE = 1.0, 0.003
#: Where no requests may be given up, slots in which a larger part of some service's is late do not keep up.
LATE = 0.05
#: Nor will any wait or rule make them keep up if a first trial has more than this late.
HOPELESS = 4 * LATE


def cut_slots(plan: Plan, drop: bool = True, rates_rps: tuple[float, ...] | None = None, wait_part: float | None = None) -> Slots:
    """Cut the GPU so that as few requests as possible are late: of the service that suffers most, and of all.

    Every number of slots is tried on a short draw of Poisson arrivals, the best few with several waits on a longer
    one, and those few, with another rule of giving up, on all of it. A draw is the same whenever a plan is made.

    Parameters
    ----------
    plan : Plan
        Its ``contention`` says what launches beside each other cost, nothing if it is None.
    drop : bool
        Whether requests that are lost are given up; if not, rates that no slots sustain have no plan.
    rates_rps : tuple of float, optional
        Of each service. By default those of the plan's allocations, or with `drop` all that the services ask for.
    wait_part : float, optional
        Do not choose how long to wait for company; see `Slots`.

    Returns
    -------
    Slots

    Raises
    ------
    InfeasiblePlan
        If a service meets its SLO at no share, or, without `drop`, if no slots keep up.
    """
    instance("plan", plan, Plan, "a Plan of lab.optimize")
    # plans for rates of the hour are made once, and would push out those that are asked for again
    found = (_cut if rates_rps is None else _cut.__wrapped__)(plan, drop, rates_rps, wait_part)
    if found is None or (not drop and max(found.late) > LATE):
        pairs = zip(plan.services, plan.allocations, strict=True)
        asks = ", ".join(f"{s.name} at {a.rate_rps:g}/s within {s.slo_ms:g} ms" for s, a in pairs)
        beside = ", slowed down as they are beside each other" if plan.contention is not None else ""
        raise InfeasiblePlan(f"no slots hold these services{beside}: {asks}; lower a rate or relax an SLO")
    return found


def try_slots(plan: Plan, drop: bool = True, wait_part: float = WAITS[0]) -> pd.DataFrame:
    """Every number of slots on all of the draw that `cut_slots` makes its trials on, all else alike.

    Parameters
    ----------
    plan : Plan
    drop : bool
        Whether requests that are lost are given up.
    wait_part : float
        Part of its SLO that the oldest request of an unfilled batch waits for company.

    Returns
    -------
    pandas.DataFrame
        One row per number that the device's shares allow: ``slots``, ``gpu_pct`` of one [GPU%], ``late``, the part of
        all requests that is late or given up, ``worst`` and ``worst_late``, the service that suffers most and that part
        of its requests, and ``latency``, the mean of latency over SLO of those launched.
    """
    instance("plan", plan, Plan, "a Plan of lab.optimize")
    planner, rows = _Planner(plan, drop, None), {}
    for count in range(1, MOST_SLOTS + 1):
        if (cut := planner.slots(count, wait_part)) is None or cut.count in rows:
            continue
        late, latency = planner.late(cut, PARTS[-1])
        most = max(range(len(late)), key=late.__getitem__)
        part = planner.every(late)
        rows[cut.count] = (cut.count, min(cut.gpu_pct), part, cut.services[most], late[most], latency)
    return pd.DataFrame(rows.values(), columns=["slots", "gpu_pct", "late", "worst", "worst_late", "latency"])


@lru_cache(maxsize=64)
def _cut(plan: Plan, drop: bool, rates_rps: tuple[float, ...] | None, wait_part: float | None) -> Slots | None:
    """Plans are compared by identity: one that is used for several seeds is thought through once."""
    planner = _Planner(plan, drop, rates_rps)
    waits = WAITS if wait_part is None else (wait_part,)
    ways = [one for count in range(1, MOST_SLOTS + 1) if (one := planner.slots(count, waits[0])) is not None]
    ways = [*{one.gpu_pct: one for one in ways}.values()]  # the same share once
    for part, field, values in zip(PARTS, ("greedy_pct", "wait_part", "worth"), (planner.rooms, waits, WORTHS), strict=True):
        tried = [replace(one, **{field: value}) for one in ways for value in values]  # type: ignore[arg-type]
        tried = [one for one in tried if one.greedy_pct + EPSILON >= _widest_greedy(one)]  # who never begins is never answered
        ways = sorted(tried, key=lambda slots, part=part: planner.pain(slots, part))[:BEST]  # type: ignore[misc]
        if not drop and ways and max(planner.late(ways[0], part)[0]) > HOPELESS:
            break
    return replace(ways[0], late=planner.late(ways[0], PARTS[-1])[0]) if ways else None


def _widest_greedy(slots: Slots) -> float:
    """GPU% of the widest launch of the greedy; 0 if nobody is."""
    return max([pct for pct, greedy in zip(slots.gpu_pct, slots.greedy, strict=True) if greedy], default=0.0)


class _Planner:
    """Trials of one plan."""

    def __init__(self, plan: Plan, drop: bool, rates_rps: tuple[float, ...] | None) -> None:
        self.plan, self.drop = plan, drop
        self.rows = list(zip(plan.services, plan.tables, plan.allocations, strict=True))
        self.contention = Contention(0) if plan.contention is None else plan.contention
        # a plan beyond the bound was sized for a part of the rates: what is given up, is given up here
        known = tuple(s.rate_rps if drop else a.rate_rps for s, _, a in self.rows)
        self.rates = known if rates_rps is None else rates_rps
        asked = demands(plan, self.rates)
        #: Part of each service's requests that can be served if the GPU is shared fairly; 1 within the bound.
        self.parts = fair_parts(asked, 100.0)
        modest = sum(pct for pct, part in zip(asked, self.parts, strict=True) if part == 1)
        #: GPU% that the greedy may hold: all of it, or what several times the demand of the others leaves.
        self.rooms = [*dict.fromkeys(100 - times * modest for times in (ROOMS if min(self.parts) < 1 else ROOMS[:1]))]

    @cached_property
    def span_ms(self) -> float:
        """Length of the draw."""
        period, every = max(s.slo_ms for s, _, _ in self.rows), sum(self.rates)
        rarest = min([rate for rate in self.rates if rate > 0], default=1.0)
        span = min(max(1000 * RAREST / rarest, PERIODS[0] * period), PERIODS[1] * period)
        return min(span, 1000 * IN_ALL / max(every, EPSILON))

    @cached_property
    def arrivals(self) -> list[list[float]]:
        """Poisson arrivals of each service [ms]."""
        drawn = []
        for m, rate in enumerate(self.rates):
            rng = np.random.default_rng(m)
            count = rng.poisson(MARGIN * rate * self.span_ms / 1000)
            drawn.append(np.sort(rng.uniform(0, self.span_ms, count)).tolist())
        return drawn

    def slots(self, count: int, wait_part: float) -> Slots | None:
        """At least so many slots; None if the device grants no such share, or a service needs more than any."""
        granted = [s for s in self.plan.shares if s <= 100 / count + EPSILON]
        if not granted:
            return None
        shares = []
        for service, table, _ in self.rows:
            wider = [s for s in self.plan.shares if s >= granted[-1]]
            fits = [s for s in wider if table.at(1, s) <= service.slo_ms / 2]
            fits = fits or [s for s in wider if table.at(1, s) <= service.slo_ms]
            if not fits:
                return None
            shares.append(fits[0])
        count = int((100 + EPSILON) // granted[-1])
        return Slots(
            services=tuple(s.name for s, _, _ in self.rows),
            count=count,
            gpu_pct=tuple(shares),
            copies=(min(count, 1 + math.ceil(2 * count / len(shares))),) * len(shares),
            greedy=tuple(part < 1 for part in self.parts),
            greedy_pct=100.0,
            wait_part=wait_part,
            worth=WORTHS[0],
            slowdown=self._slowdown(shares),
        )

    def _slowdown(self, shares: Sequence[float]) -> tuple[float, ...]:
        """What each launch costs beside as many of the longest others as fit, to a hundredth."""
        if not self.contention.slowdown:
            return (1.0,) * len(shares)
        loads = []
        for (service, table, _), share in zip(self.rows, shares, strict=True):
            times = rising([table.at(b, share) for b in range(1, table.batch_max + 1)])
            batch = max(1, in_time(times, table.batch_max, service.slo_ms / 2))
            loads.append(Load(table, batch, share, times[batch], share))
        longest = max(loads, key=lambda load: load.service_ms)
        found = []
        for load in loads:
            others = int((100 - load.gpu_pct + EPSILON) // longest.gpu_pct)
            found.append(round(self.contention.stretch([load, *[longest] * others])[0], 2))
        return tuple(found)

    def late(self, slots: Slots, part: float) -> tuple[tuple[float, ...], float]:
        """Part of each service's requests that is late in a trial on this part of the draw, and mean latency over SLO."""
        until, riders = part * self.span_ms, []
        columns = zip(slots.gpu_pct, slots.copies, slots.greedy, slots.slowdown, strict=True)
        for (service, table, planned), times, (share, copies, greedy, slow) in zip(
            self.rows, self.arrivals, columns, strict=True
        ):
            takes = rising([slow * table.at(b, share) for b in range(1, table.batch_max + 1)])
            arrivals = times[: int(np.searchsorted(times, until))]
            wait_ms = slots.wait_part * service.slo_ms
            riders.append(Rider(arrivals, service.slo_ms, share, copies, greedy, takes, planned.batch, wait_ms))
        counts, latency = late_in_slots(riders, slots.worth, self.drop, slots.greedy_pct)
        return tuple(n / max(1, len(r.arrivals_ms)) for n, r in zip(counts, riders, strict=True)), latency

    def pain(self, slots: Slots, part: float) -> float:
        """What a way to cut costs in a trial; nobody suffers by what a fair share of the GPU cannot serve."""
        late, latency = self.late(slots, part)
        modest = max([x for x, fair in zip(late, self.parts, strict=True) if fair == 1], default=0.0)
        greedy = max([x - (1 - fair) for x, fair in zip(late, self.parts, strict=True) if fair < 1], default=0.0)
        return WORST * modest + greedy + self.every(late) + TIE * latency

    def every(self, late: Sequence[float]) -> float:
        """Late part of all requests."""
        return sum(r * x for r, x in zip(self.rates, late, strict=True)) / max(sum(self.rates), EPSILON)

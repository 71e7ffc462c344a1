"""Exercises on D-STACK's schedule: read a period plan, find what is wrong with one, and measure fairness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from dstack_lab.arrivals import Poisson
from dstack_lab.checks import require
from dstack_lab.exercises.base import UNANSWERED, Mistake, Verdict, graded, right, unanswered, wrong
from dstack_lab.metrics import jain
from dstack_lab.policies import PeriodPlan, Window
from dstack_lab.services import Allocation, Service

#: What can be wrong with a period plan, and what is true of one that lacks that fault.
FAULTS = {
    "over": "its windows never hold more than 100 GPU% together",
    "overlap": "no two windows of one service run at the same time",
    "late": "a request that just misses a window is answered by the next one's end, within its SLO",
}
OK = "ok"


def check_worst_latency(answer: object, period: PeriodPlan, service: str) -> Verdict:
    """Judge the longest latency [ms] of a request that only planned windows serve, none of them full.

    The request comes just after a window of its service has begun; it waits for the next window and is
    answered at that one's end. The period repeats, so the last window is followed by the first.

    Parameters
    ----------
    answer : number
        Latency [ms].
    period : PeriodPlan
        Of `lab.plan_period`.
    service : str
    """
    mine = _of(period, service)
    gaps, times = _gaps(period, mine), [w.end_ms - w.start_ms for w in mine]
    truth = max(gap + ms for gap, ms in zip(gaps, [*times[1:], times[0]], strict=True))
    mistakes = [
        Mistake(max(gaps), "That is the longest wait for a window. The request is answered when that window ends."),
        Mistake(max(times), "That is the length of a window. The request just missed one: how long does it wait for the next?"),
        Mistake(max(gaps) - min(times), "That is the pause between two windows. Count from the start of the one it missed."),
        Mistake(max(gaps) / 2 + max(times), "That is the mean over requests that come at any time. The longest is asked for."),
        Mistake(period.period_ms, "That is the period. The service has several windows in it: how far apart are they?"),
        Mistake(
            period.period_ms + max(times), "That would be right if the service had one window in a period. Count its windows."
        ),
    ]
    if len(mine) > 1:
        inside = max(b.start_ms - a.start_ms for a, b in pairwise(mine)) + max(times)
        mistakes.append(Mistake(inside, "The period repeats: look also from the last window to the first of the next period."))
    hint = f"Take the starts of the windows of {service}: from one to the next, and then to that one's end."
    why = "From the start of the window it missed to the end of the next: the plan keeps that within the SLO."
    return graded(answer, truth, "ms", why, mistakes, hint, rel=0.01)


def check_broken_periods(answer: object, cases: Mapping[str, PeriodPlan], services: Sequence[Service]) -> Verdict:
    """Judge what is wrong with each of several period plans.

    Parameters
    ----------
    answer : mapping of str to str, or str or iterable of str in the order of `cases`
        For each case ``"ok"`` or one of `FAULTS`: "over", "overlap", "late". "Too late" counts as "late".
    cases : mapping of str to PeriodPlan
    services : sequence of Service
        Whose SLOs the windows have to keep.
    """
    words = (OK, *FAULTS)
    if unanswered(answer):
        return wrong(UNANSWERED)
    if isinstance(answer, str):
        answer = answer.replace(",", " ").split()
    if isinstance(answer, (list, tuple)) and len(answer) == len(cases):
        answer = dict(zip(cases, answer, strict=True))
    if not isinstance(answer, Mapping) or set(answer) != set(cases):
        return wrong(f"Give a dict with one word for each of {', '.join(cases)}: {', '.join(words)}.")
    if all(unanswered(said) for said in answer.values()):
        return wrong(UNANSWERED)
    given = {name: said.lower().split()[-1:] if isinstance(said, str) else [said] for name, said in answer.items()}
    for name, one in given.items():
        if not one or one[0] not in words:
            return wrong(f"{name}: the word is one of {', '.join(words)}.")
    for name, period in cases.items():
        found, said = faults(period, services), given[name][0]
        if said == OK and found:
            return wrong(f"{name} is not in order. {_LOOK[min(found, key=list(FAULTS).index)]}")
        if said != OK and not found:
            return wrong(f"{name} does not break that rule: {FAULTS[said]}. Look at the other two once more.")
        if said != OK and said not in found:
            return wrong(f"{name} is broken, but in another way: {FAULTS[said]}.")
    return right("Three rules make a period plan: at most 100 GPU% at any time, one window of a service at a time, SLOs kept.")


#: Where to look, without saying what is there.
_LOOK = {
    "over": "Draw a vertical line through the windows at each start and add up what it cuts.",
    "overlap": "Compare each window's end with the start of the next one of the same service.",
    "late": "For each service, go from one window's start to the next one's end, also across the end of the period.",
}


def faults(period: PeriodPlan, services: Sequence[Service]) -> set[str]:
    """Return which of `FAULTS` a period plan has, by looking at every instant where something changes."""
    found = set()
    turns = (-period.period_ms, 0.0, period.period_ms)
    around = [(w.start_ms + t, w.end_ms + t, w) for w in period.windows for t in turns]
    for instant in [w.start_ms for w in period.windows]:
        held = [w for start, end, w in around if start <= instant + 1e-6 and end > instant + 1e-6]
        if sum(w.gpu_pct for w in held) > 100 + 1e-6:
            found.add("over")
        if len({w.service for w in held}) < len(held):
            found.add("overlap")
    for service in services:
        mine = _of(period, service.name)
        times = [w.end_ms - w.start_ms for w in mine]
        worst = max(gap + ms for gap, ms in zip(_gaps(period, mine), [*times[1:], times[0]], strict=True))
        if worst > service.slo_ms + 1e-6:
            found.add("late")
    return found


def period_puzzle() -> tuple[dict[str, PeriodPlan], tuple[Service, ...]]:
    """Return four small period plans of two services, of 100 ms each; some are broken, each in one way."""
    services = (Service("resnet50", 60, Poisson(80)), Service("vgg19", 100, Poisson(30)))
    length = {"resnet50": (50.0, 15.0, 4), "vgg19": (50.0, 40.0, 3)}  # share, service time, batch

    def plan(starts: Mapping[str, Sequence[float]], **other_pct: float) -> PeriodPlan:
        windows, points = [], []
        for name, (share, ms, batch) in length.items():
            share = other_pct.get(name, share)
            windows += [Window(start, start + ms, name, share, batch) for start in starts[name]]
            points.append(Allocation(name, share, batch, ms, 1000 * batch * len(starts[name]) / 100))
        return PeriodPlan(100.0, tuple(sorted(windows, key=lambda w: (w.start_ms, w.service))), tuple(points))

    cases = {
        "A": plan({"resnet50": (0, 40, 80), "vgg19": (0, 50)}),
        "B": plan({"resnet50": (0, 50, 75), "vgg19": (15, 55)}, resnet50=40, vgg19=60),
        "C": plan({"resnet50": (0, 10, 55), "vgg19": (0, 50)}, resnet50=30, vgg19=40),
        "D": plan({"resnet50": (0, 40, 75), "vgg19": (15, 55)}, vgg19=60),
    }
    return cases, services


def check_jain(answer: object, received: Mapping[str, float] | Iterable[float]) -> Verdict:
    """Judge Jain's index of what several services received.

    Parameters
    ----------
    answer : number
        From 1/n to 1.
    received : mapping of str to number, Series, or iterable of number
        GPU%·ms of each service, say.
    """
    values = received.values() if isinstance(received, dict) else received
    x = np.asarray(list(values), dtype=float)
    require(x.size > 1 and bool(x.any()), "received", x.tolist(), "2 or more amounts, not all 0")
    truth, n = jain(x), x.size
    mistakes = [
        Mistake(float(x.sum() ** 2 / (x**2).sum()), f"That is how many services are really served. Divide by {n}, their number."),
        Mistake(float(x.min() / x.max()), "That is the least over the most. Jain's index looks at all services."),
        Mistake(float((x**2).sum() * n / x.sum() ** 2), "Upside down: the square of the sum is on top."),
        Mistake(float(x.sum() / (n * (x**2).sum())), "Square the sum too: otherwise the index depends on the unit."),
        Mistake(1 - truth, "1 is equal, 1/n is all to one: yours runs the other way."),
    ]
    hint = "The square of the sum, over n times the sum of the squares."
    why = f"1 would be equal parts, {1 / n:.2g} all to one."
    return graded(answer, truth, "fraction", why, mistakes, hint, rel=0.005)


def _of(period: PeriodPlan, service: str) -> list[Window]:
    names = list(dict.fromkeys(w.service for w in period.windows))
    require(service in names, "service", service, f"one of {names}")
    return sorted((w for w in period.windows if w.service == service), key=lambda w: (w.start_ms, w.end_ms))


def _gaps(period: PeriodPlan, mine: Sequence[Window]) -> list[float]:
    """From each window's start to the next one's, the last to the first of the next period."""
    starts = [w.start_ms for w in mine]
    return [b - a for a, b in pairwise([*starts, starts[0] + period.period_ms])]

"""Exercises on the operating point: batch and share under an SLO, plans that cannot be, and the bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dstack_lab.arrivals import Poisson
from dstack_lab.bounds import bound, granted_shares, service_tables
from dstack_lab.checks import percent, positive, require
from dstack_lab.constraints import broken_most, feasible, points, score_of, scores
from dstack_lab.exercises.base import (
    UNANSWERED,
    Mistake,
    Verdict,
    as_names,
    as_number,
    graded,
    is_whole,
    right,
    unanswered,
    wrong,
)
from dstack_lab.profiles import Profile
from dstack_lab.services import Allocation, Plan, Service, ServiceTable

#: An operating point whose score is this close to the best is as good: no scheduler tells them apart.
TIE = 0.01


def broken_words(held: str, ms: float, batch: int, service: Service) -> str:
    """Say in numbers how a point of service time `ms` breaks the constraint `held`."""
    slo_ms, rate_rps = service.slo_ms, service.rate_rps
    if held == "SLO: wait":
        return (
            "a request that just misses a launch waits for it and then for its own: "
            f"twice the service time is {2 * ms:.1f} ms, more than the SLO of {slo_ms:g} ms"
        )
    if held == "SLO: fill":
        return (
            f"the first request of a batch waits for the last, (batch - 1) / rate = {1000 * (batch - 1) / rate_rps:.1f} ms: "
            f"with the service time that is more than the SLO of {slo_ms:g} ms"
        )
    return f"one launch after another serves {1000 * batch / ms:.1f} requests/s, fewer than the {rate_rps:g} that arrive"


def check_largest_batch(answer: object, profile: Profile, model: str, slo_ms: float, gpu_pct: float = 100.0) -> Verdict:
    """Judge the largest batch b with 2 L(b, g) <= SLO: what a request that just missed a launch can afford.

    Parameters
    ----------
    answer : number
        Requests, a whole number.
    profile, model
        The service times; batches between the profiled ones are read from the fitted curve.
    slo_ms, gpu_pct : float
        SLO [ms] and share [GPU%].
    """
    (table,) = service_tables([one(model, slo_ms)], profile)
    ms = np.array([table.at(b, percent("gpu_pct", gpu_pct)) for b in range(1, table.batch_max + 1)])
    fits = np.flatnonzero(2 * ms <= slo_ms)
    require(len(fits) > 0, "slo_ms", slo_ms, f"at least {2 * ms[0]:.3g} ms, so that a batch of 1 meets it")
    truth = int(fits[-1]) + 1
    given = as_number(answer)
    if given is not None and not is_whole(given):
        return wrong("A batch is a whole number of requests: round down, or the SLO is missed.")
    if given is not None and 1 <= given <= table.batch_max and abs(2 * ms[int(given) - 1] - slo_ms) <= 0.005 * slo_ms:
        return right(f"Two launches of {int(given)} take just about {slo_ms:g} ms.")  # as near as the curve is known
    once = np.flatnonzero(ms <= slo_ms)
    profiled = [b for b in profile.of(model)["batch"].unique() if b <= truth]
    mistakes = [
        Mistake(
            float(once[-1]) + 1,
            "That batch ends in time if it starts at once. A request that just missed a launch waits for that one first.",
        ),
        Mistake(float(max(profiled)), "That is the largest profiled batch. Batches in between exist too: ask the fitted curve."),
        Mistake(float(truth + 1), "One too many: look at twice its service time."),
        Mistake(float(truth - 1), "It fits, but one more request does too."),
    ]
    hint = f"Compute 2 x service time at {gpu_pct:g} GPU% for batch 1, 2, 3, ... and stop before it passes {slo_ms:g} ms."
    why = f"Two launches of {truth} take {2 * ms[truth - 1]:.1f} ms; the next batch would miss {slo_ms:g} ms."
    return graded(answer, float(truth), "", why, mistakes, hint, rel=0)


def check_operating_point(answer: object, service: Service, profile: Profile, objective: str = "efficacy") -> Verdict:
    """Judge an operating point by an exhaustive search over all batches and all whole GPU%.

    Every feasible point whose objective is within 1 % of the best one of the profile's shares is right,
    so finer steps and ties pass.

    Parameters
    ----------
    answer : (batch, gpu_pct), mapping, Allocation or Plan
        The point; a mapping has the keys ``batch`` and ``gpu_pct``, a plan holds one service.
    service : Service
    profile : Profile
    objective : {"efficacy", "capacity"}
    """
    (table,) = service_tables([service], profile)
    shares = granted_shares(profile, [service], None, None)
    good = feasible(table, shares, service.slo_ms, service.rate_rps)
    require(bool(good.any()), "service", service.name, "one that meets its SLO at some point")
    best = float(scores(table, shares, objective)[good].max())
    if unanswered(answer):
        return wrong(UNANSWERED)
    point = _point(answer)
    if point is None:
        return wrong("Give a pair (batch, gpu_pct), such as (4, 50).")
    batch, share = point
    if (is_whole(share) and not is_whole(batch)) or (is_whole(batch) and share < 1):
        return wrong("The first number is the batch, a whole number; the second the share in GPU%, from 1 to 100.")
    if not (is_whole(batch) and 1 <= batch <= table.batch_max and 1 <= share <= 100):
        return wrong(
            f"The batch is a whole number from 1 to {table.batch_max}, the share from 1 to 100 GPU%; perhaps they are swapped."
        )
    ms = table.at(int(batch), share)
    held = broken_most(ms, int(batch), service.slo_ms, service.rate_rps)
    if held != "none":
        said = f"Batch {int(batch)} at {share:g} GPU% takes {ms:.1f} ms, and {broken_words(held, ms, int(batch), service)}."
        turned = is_whole(share) and share <= table.batch_max and table.at(int(share), batch)
        if turned and broken_most(turned, int(share), service.slo_ms, service.rate_rps) == "none":
            said += " The batch is the first number, the share the second: perhaps they are swapped."
        return wrong(said)
    score = score_of(ms, int(batch), share, objective)
    if score >= (1 - TIE) * best:
        return right(
            f"No feasible point is more than {TIE:.0%} better in {objective}: batch {int(batch)} at {share:g} GPU%, {ms:.1f} ms."
        )
    other = "capacity" if objective == "efficacy" else "efficacy"
    if score_of(ms, int(batch), share, other) >= (1 - TIE) * float(scores(table, shares, other)[good].max()):
        return wrong(f"That is the best point for {other}. The question asks for {objective}.")
    return wrong(f"The point is feasible, but its {objective} is {1 - score / best:.0%} below the best. {_nudge(objective)}")


def check_infeasible(answer: object, cases: Mapping[str, Sequence[Service]], profile: Profile) -> Verdict:
    """Judge which of several sets of services no plan can serve.

    Parameters
    ----------
    answer : str or iterable of str
        Names of the cases that are infeasible: ``"B, C"``, ``["B", "C"]`` or a set; empty if none is.
    cases : mapping of str to sequence of Service
    profile : Profile
    """
    verdicts = {name: why_infeasible(services, profile) for name, services in cases.items()}
    truth = {name for name, why in verdicts.items() if why}
    if unanswered(answer):
        return wrong(UNANSWERED)
    given = as_names(answer)
    if given is not None and not given <= set(cases):  # b is B, where no case is called b
        upper = {name.upper() for name in given}
        given = upper if upper <= set(cases) else None
    if given is None:
        return wrong(f"Name the cases that cannot be served: some of {', '.join(cases)}.")
    for name in sorted(truth - given):
        if verdicts[name] == "SLO":
            return wrong(f"Look at case {name} again: is there any batch and share at which each service meets its own SLO?")
        return wrong(
            f"Look at case {name} again: each service alone can be served. How much "
            f"GPU do they need together, at their cheapest points?"
        )
    for name in sorted(given - truth):
        return wrong(
            f"Case {name} can be served: every service meets its SLO somewhere, and the demands sum to less than 100 GPU%."
        )
    return right("Each of them fails: one service misses its SLO at every point, or together they need more than the whole GPU.")


def why_infeasible(services: Iterable[Service], profile: Profile) -> str:
    """Return "SLO" if a service has no feasible point, "total" if the cheapest points need over 100 %, else ""."""
    found = tuple(services)
    shares = granted_shares(profile, found, None, None)
    demand = 0.0
    for service, table in zip(found, service_tables(found, profile), strict=True):
        if not feasible(table, shares, service.slo_ms, service.rate_rps).any():
            return "SLO"
        ms, batch, share = points(table, shares)
        demand += service.rate_rps * float((share * ms / batch)[ms <= service.slo_ms].min()) / 1000
    return "total" if demand > 100 * (1 + 1e-9) else ""


def check_bound(answer: object, services: Sequence[Service], profile: Profile) -> Verdict:
    """Judge the most requests/s that any schedule of whole batches can answer in time.

    Parameters
    ----------
    answer : number
        Total goodput of all services [requests/s].
    services, profile
        As for `lab.bound`.
    """
    limit = bound(services, profile)
    rates, areas = [s.rate_rps for s in services], limit.area_pct_ms
    asked = sum(r * a for r, a in zip(rates, areas, strict=True)) / 100_000
    whole = [_whole_area(t, s.slo_ms) for s, t in zip(services, service_tables(services, profile), strict=True)]
    mistakes = [
        Mistake(sum(rates), "That is what arrives. Add up what it asks of the GPU: it is more than there is."),
        Mistake(
            sum(rates) / asked,
            "That serves the same part of every rate. The bound may prefer the requests that cost less GPU%·ms.",
        ),
        Mistake(
            _fill(rates, whole),
            "That holds for one batch at a time on the whole GPU. A smaller share costs less GPU%·ms per request.",
        ),
        Mistake(max(100_000 / a for a in areas), "That many of the cheapest requests would fit, but fewer of them arrive."),
        Mistake(100 * asked, "That is the GPU% that all requests together ask for. How many of them fit into 100 GPU%?"),
        *(Mistake(r, f"That is the part of {name} alone. The bound counts all services.") for name, r in limit.rates_rps.items()),
    ]
    hint = "Serve the services in the order of their GPU%·ms per request, cheapest first, until 100 GPU% x 1000 ms are spent."
    why = "Each request costs at least its smallest area, and a second has 100 GPU% x 1000 ms to spend: no schedule beats this."
    return graded(answer, limit.total_rps, "requests/s", why, mistakes, hint)


def _whole_area(table: ServiceTable, slo_ms: float) -> float:
    """Least GPU%·ms per request at 100 GPU%; infinite if no batch meets the SLO."""
    ms = table.ms[:, 99]
    area = 100 * ms / np.arange(1, table.batch_max + 1)
    return float(area[ms <= slo_ms].min(initial=np.inf))


def _fill(rates: Sequence[float], areas: Sequence[float]) -> float:
    """Requests/s served when the cheapest come first; the linear program's optimum, as a knapsack."""
    left, served = 100_000.0, 0.0
    for area, rate in sorted(zip(areas, rates, strict=True)):
        take = min(rate, left / area)
        served, left = served + take, left - take * area
    return served


def one(model: str, slo_ms: float) -> Service:
    """Return a service that stands for a model where only its service times matter."""
    return Service(model, positive("slo_ms", slo_ms), Poisson(1.0))


def _point(answer: Any) -> tuple[float, float] | None:
    """Batch and share of what a reader gave."""
    if isinstance(answer, Plan):
        answer = answer.allocations[0] if len(answer.allocations) == 1 else None
    if isinstance(answer, Allocation):
        answer = (answer.batch, answer.gpu_pct)
    if hasattr(answer, "to_dict"):
        answer = answer.to_dict()
    if isinstance(answer, Mapping):
        answer = (answer.get("batch"), answer.get("gpu_pct"))
    if not isinstance(answer, (tuple, list, np.ndarray)) or len(answer) != 2:
        return None
    batch, share = map(as_number, answer)
    return None if batch is None or share is None else (batch, share)


def _nudge(objective: str) -> str:
    if objective == "efficacy":
        return "Efficacy is batch / (service time² x GPU%): search all pairs, not one of the two after the other."
    return "Capacity is batch / (service time x GPU%): search all pairs, not one of the two after the other."

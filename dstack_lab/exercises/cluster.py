"""Exercises on several GPUs: how many are needed, and what goes on which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from dstack_lab.arrivals import Poisson
from dstack_lab.checks import count, percent, require
from dstack_lab.cluster import Cluster, Placement, cluster_bound, place
from dstack_lab.cluster.demand import demands, plan_gpu
from dstack_lab.exercises.base import UNANSWERED, Mistake, Verdict, as_number, graded, right, unanswered, wrong
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Service

#: Parts of a rate that a reader's fractions may miss in sum.
ROUNDING = 0.011


def check_fewest_gpus(answer: object, services: Sequence[Service], method: str, profile: Profile, most: int = 12) -> Verdict:
    """Judge how many equal GPUs a way of placing needs.

    Parameters
    ----------
    answer : number
    services : sequence of Service
    method : {"dstack", "temporal", "exclusive"}
    profile : Profile
    most : int
        Largest number that is tried.
    """
    # a placement knows rates only; arrivals of one's own need not be hashable
    asked = tuple(replace(s, arrivals=Poisson(s.rate_rps)) for s in services)
    load = cluster_bound(asked, Cluster(gpus=1, profile=profile)).load

    def fewest(how: str) -> int:  # below the bound none will do
        tried = range(max(1, math.ceil(load - 1e-6)), count("most", most) + 1)
        return next((n for n in tried if _placed(asked, n, how, profile)), 0)

    truth = fewest(method)
    require(truth > 0, "most", most, "enough for the services")
    given = as_number(answer)
    if given is not None and given < load:
        return wrong(f"The services ask for {load:.2f} GPUs at least, whoever schedules them: fewer cannot do.")
    mistakes = [
        Mistake(math.ceil(load), "That is the bound rounded up: it fits if nothing is lost to whole launches and deadlines.")
    ]
    words = {
        "exclusive": "That is one service per GPU. Here several share one.",
        "dstack": f"That many are enough at shares side by side, but not for {method} placement.",
    }
    if given is not None and given != truth:
        mistakes += [Mistake(fewest(how), hint) for how, hint in words.items() if how != method]
    why = f"By {method} placement {truth} hold all and {truth - 1} cannot; the bound asks for {load:.2f}."
    hint = "Try lab.place with 1, 2, 3, ... GPUs: it raises lab.InfeasiblePlan while there are too few."
    return graded(answer, truth, "", why, mistakes, hint, rel=1e-9)


def check_assignment(answer: object, services: Sequence[Service], cluster: Cluster, most_pct: float = 100.0) -> Verdict:
    """Judge a placement made by hand: every request has a GPU, every GPU can be scheduled by D-STACK, and none is too full.

    Every placement that works is right, whichever way it was found.

    Parameters
    ----------
    answer : mapping of str to str, or to mapping of str to number, or Placement
        For each service its GPU, or the part of its requests on each of several, such as
        ``{"a": "gpu0", "b": {"gpu0": 0.5, "gpu1": 0.5}}``; or for each GPU a list of its services.
    services : sequence of Service
    cluster : Cluster
    most_pct : float
        What the busiest GPU may need on average [GPU%].
    """
    if unanswered(answer):
        return wrong(UNANSWERED)
    names = [s.name for s in services]
    if isinstance(answer, Placement):
        answer = {name: {r.gpu: r.part for r in answer.of(name)} for name in {r.service for r in answer.replicas}}
    answer = _turned(answer, cluster)
    if not isinstance(answer, Mapping) or set(answer) != set(names):
        return wrong(f"Give a dict with an entry for each of {', '.join(names)}.")
    if any(unanswered(where) for where in answer.values()):
        return wrong(UNANSWERED)
    parts: dict[str, dict[str, float]] = {gpu: {} for gpu in cluster.names}
    for name, where in answer.items():
        where = {where: 1.0} if isinstance(where, str) else where
        if not isinstance(where, Mapping) or not set(where) <= set(cluster.names):
            return wrong(f"{name}: name one or more of {', '.join(cluster.names)}.")
        given = {gpu: as_number(part) for gpu, part in where.items()}
        if any(part is None or part < 0 for part in given.values()):
            return wrong(f"{name}: the part of its requests on a GPU is a number from 0 to 1.")
        total = sum(part for part in given.values() if part is not None)
        if abs(total - 100) <= 100 * ROUNDING:  # percent
            given, total = {gpu: (part or 0) / 100 for gpu, part in given.items()}, total / 100
        if abs(total - 1) > ROUNDING:
            return wrong(f"{name}: the parts sum to {total:.3g}. Every request needs exactly one GPU: they have to sum to 1.")
        for gpu, part in given.items():
            if part:
                parts[gpu][name] = part / total
    return _judged(parts, services, cluster, percent("most_pct", most_pct))


def _turned(answer: object, cluster: Cluster) -> object:
    """Lists of services by GPU, as the same by service; a service on several GPUs is split evenly. Else the answer itself."""
    if not isinstance(answer, Mapping) or not set(answer) <= set(cluster.names):
        return answer
    if not all(isinstance(names, (list, tuple, set)) for names in answer.values()):
        return answer
    where: dict[object, list[object]] = {}
    for gpu, names in answer.items():
        for name in names:
            where.setdefault(name, []).append(gpu)
    return {name: dict.fromkeys(gpus, 1 / len(gpus)) for name, gpus in where.items()}


def _judged(parts: Mapping[str, Mapping[str, float]], services: Sequence[Service], cluster: Cluster, most_pct: float) -> Verdict:
    """Plan each GPU for the parts it was given."""
    demand = {}
    for gpu, profile in zip(cluster.names, cluster.profiles(), strict=True):
        mine = [replace(s, arrivals=Poisson(s.rate_rps * parts[gpu][s.name])) for s in services if s.name in parts[gpu]]
        if not mine:
            demand[gpu] = 0.0
            continue
        unknown = [s.model for s in mine if s.model not in profile.models]
        if unknown:
            return wrong(f"{gpu} has no profile of {', '.join(unknown)}.")
        each = demands(mine, profile, "dstack", 1)[:, 1]
        demand[gpu] = float(each.sum())
        if demand[gpu] > 100:
            asks = ", ".join(
                f"{s.name} {pct:.0f} %" if pct < 1000 else f"{s.name} too much" for s, pct in zip(mine, each, strict=True)
            )
            return wrong(f"{gpu} would need more than 100 GPU% even at the cheapest points: {asks}. Move or split something.")
        try:
            plan_gpu(mine, profile, "dstack", "efficacy")
        except InfeasiblePlan:
            return wrong(
                f"{gpu} needs {demand[gpu]:.0f} GPU% on average, which fits, but in no slots are requests of "
                f"{', '.join(s.name for s in mine)} in time. Relieve it, or pair services with other SLOs."
            )
    busiest = max(demand, key=demand.__getitem__)
    if demand[busiest] > most_pct:
        idlest = min(demand, key=demand.__getitem__)
        return wrong(
            f"Every GPU can be scheduled, but {busiest} needs {demand[busiest]:.1f} GPU%, and at most {most_pct:g} is asked for. "
            f"{idlest} needs only {demand[idlest]:.1f}: move something there, or a part of it."
        )
    bound = 100 * cluster_bound(services, cluster).load
    return right(f"The busiest, {busiest}, needs {demand[busiest]:.0f} GPU%; no placement can have less than {bound:.0f}.")


@lru_cache(maxsize=128)
def _placed(services: tuple[Service, ...], gpus: int, method: str, profile: Profile) -> bool:
    """Looked for once: whoever answers again need not wait again."""
    try:
        place(services, Cluster(gpus=gpus, profile=profile), method)
    except InfeasiblePlan:
        return False
    return True

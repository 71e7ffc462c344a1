"""Exercises on sharing a GPU: in time, in space, and without any control."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dstack_lab.bounds import service_tables
from dstack_lab.constraints import broken_most
from dstack_lab.contention import Contention, Load
from dstack_lab.exercises.base import UNANSWERED, Mistake, Verdict, as_counts, graded, right, unanswered, wrong
from dstack_lab.exercises.batches import broken_words, one
from dstack_lab.profiles import Profile
from dstack_lab.services import Service


def check_slices(answer: object, services: Sequence[Service], profile: Profile) -> Verdict:
    """Judge fixed slices of the GPU: together at most 100 %, and each enough for its service alone.

    Every division that works is right. A slice is enough if at some batch the service keeps its SLO and its
    rate in it, whatever runs beside it.

    Parameters
    ----------
    answer : mapping of str to number, or numbers in the order of `services`
        GPU% of each service.
    services : sequence of Service
    profile : Profile
    """
    if unanswered(answer):
        return wrong(UNANSWERED)
    slices = as_counts(answer, [s.name for s in services])
    if slices is None:
        return wrong(f"Give one GPU% for each of {', '.join(s.name for s in services)}, as a dict of name to number.")
    if all(0 < g <= 1 for g in slices.values()):
        return wrong("Give shares in GPU%, from 1 to 100, not as fractions.")
    for name, share in slices.items():
        if not 1 <= share <= 100:
            return wrong(f"{name}: a share lies from 1 to 100 GPU%.")
    if (total := sum(slices.values())) > 100 + 1e-6:
        return wrong(f"The slices sum to {total:g} GPU%. Fixed slices must fit side by side: at most 100.")
    for service, table in zip(services, service_tables(services, profile), strict=True):
        share = slices[service.name]
        held = [broken_most(table.at(b, share), b, service.slo_ms, service.rate_rps) for b in range(1, table.batch_max + 1)]
        if "none" in held:
            continue
        if 2 * table.at(1, share) > service.slo_ms:
            reason = broken_words("SLO: wait", table.at(1, share), 1, service)
            return wrong(f"{service.name} is too slow at {share:g} GPU% even with a batch of 1: {reason}.")
        fits = [1000 * b / ms for b in range(1, table.batch_max + 1) if 2 * (ms := table.at(b, share)) <= service.slo_ms]
        return wrong(
            f"{service.name} does not keep up with {service.rate_rps:g} requests/s at {share:g} GPU%: "
            f"batches small enough for the SLO serve at most {max(fits):.0f}. Give it more."
        )
    return right(f"Side by side they take {total:g} GPU%, and each keeps its SLO and its rate whatever the others do.")


def check_beside(
    answer: object,
    profile: Profile,
    mine: tuple[str, int, float],
    others: Sequence[tuple[str, int, float]],
    contention: Contention | None = None,
) -> Verdict:
    """Judge the service time [ms] of a launch that runs beside others all the time.

    Parameters
    ----------
    answer : number
        Service time [ms].
    profile : Profile
    mine : (model, batch, gpu_pct)
        The launch.
    others : sequence of (model, batch, gpu_pct)
        What runs beside it.
    contention : Contention, optional
        ``Contention()`` by default.
    """
    loads = [_load(profile, *launch) for launch in (mine, *others)]
    model = Contention() if contention is None else contention
    alone = loads[0].service_ms
    truth = alone * model.stretch(loads)[0]
    points = [_point(profile, load, launch) for load, launch in zip(loads, (mine, *others), strict=True)]
    by_points = points[0].service_ms * model.stretch(points)[0]
    total = sum(load.knee_pct for load in loads)
    fits = total <= 100
    free = Contention(slowdown=0.0, exponent=model.exponent, sharing=model.sharing)
    apart = alone * free.stretch(loads)[0]
    proportional = Contention(model.slowdown, model.exponent, "proportional")
    mistakes = [
        Mistake(alone, "That is its time alone. What do the others cost it, even on disjoint shares?"),
        Mistake(apart, "That leaves out the slowdown that every neighbour costs through the shared memory."),
        Mistake(truth / alone, "That is the slowdown, a factor. The question asks for the time."),
        Mistake(alone * len(loads), "That would be equal turns. Their launches are not equally long."),
        Mistake(truth / alone - 1, "That is what is added, as a fraction. How long does the launch take with it?"),
        Mistake(truth - alone, "That is only what is added. The launch itself takes its time too."),
    ]
    if len(loads) == 2:
        other = loads[1].service_ms
        flipped = 1 + model.slowdown * (alone / other) ** model.exponent
        mistakes += [
            Mistake(apart * flipped, "The ratio is upside down: the neighbour's service time over its own."),
            Mistake(apart * (1 + model.slowdown), "That leaves the ratio of the two service times out of the slowdown."),
            Mistake(other, "That is the neighbour's time alone."),
            Mistake(other * model.stretch(loads)[1], "That is how long the neighbour takes, not this launch."),
            Mistake(alone + other, "That is both in a row, as if nothing fitted side by side and shared memory cost nothing."),
        ]
    if not fits:
        mistakes.append(
            Mistake(
                alone * proportional.stretch(loads)[0],
                "That shares the SMs in proportion. Without a partition, kernels take turns: "
                "it waits for the work of the others that does not fit.",
            )
        )
        beside = 1 + sum(model.slowdown * (load.service_ms / alone) ** model.exponent for load in loads[1:])
        mistakes.append(
            Mistake(
                alone * beside,
                "That is the slowdown through the shared memory alone. What of the others' work does not fit must be waited for.",
            )
        )
    why = (
        f"They fit side by side ({total:.0f} GPU% in use), so only the shared memory slows it down."
        if fits
        else f"Together they can use {total:.0f} GPU%: what does not fit waits its turn, and small kernels wait for large ones."
    )
    hint = "First add up the GPU% that each can use (its knee, at most its share). Does the sum fit into 100?"
    # closer than elsewhere: the ratio of the service times changes the answer by half a percent
    return graded(answer, (truth, by_points), "ms", why, mistakes, hint, rel=0.001)


def _load(profile: Profile, model: str, batch: int, gpu_pct: float) -> Load:
    (table,) = service_tables([one(model, 1.0)], profile)
    return Load(table, batch, gpu_pct, table.at(batch, gpu_pct), float(np.minimum(table.knee_pct(batch), gpu_pct)))


def _point(profile: Profile, load: Load, launch: tuple[str, int, float]) -> Load:
    """Give a load the time of the profile's own point, where it has one; a reader may take it from there."""
    model, batch, gpu_pct = launch
    rows = profile.of(model)
    rows = rows[(rows["batch"] == batch) & (rows["gpu_pct"] == gpu_pct)]
    return load._replace(service_ms=float(rows["service_ms"].iloc[0])) if len(rows) else load

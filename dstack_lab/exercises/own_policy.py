"""Exercises that ask for a policy: one that runs, one that beats another, one that is fair. Judged by results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import positive, require
from dstack_lab.exercises.base import Verdict, right, wrong
from dstack_lab.exercises.referee import lost, play
from dstack_lab.metrics import gpu_time, jain, summary
from dstack_lab.policies import Policy, Temporal
from dstack_lab.profiles import Profile
from dstack_lab.services import Service
from dstack_lab.simulator import simulate
from dstack_lab.traces import Trace
from dstack_lab.trials import plan_for

SEEDS = (11, 12, 13, 14, 15)
DURATION_MS = 2_000.0


def check_policy(
    answer: object,
    services: Sequence[Service],
    profile: Profile,
    attainment: float = 0.9,
    *,
    seeds: Iterable[int] = SEEDS,
    duration_ms: float = DURATION_MS,
) -> Verdict:
    """Judge a first policy: it keeps the rules and answers enough of every service's requests in time.

    Parameters
    ----------
    answer : Policy
        An object; a class that needs no arguments will do.
    services : sequence of Service
        Of a light load.
    profile : Profile
    attainment : float
        Part of its requests that each service has to keep within SLO, over all seeds.
    seeds, duration_ms
        Of the runs [ms].
    """
    plan = plan_for(services, profile, "efficacy")
    runs = play(answer, plan, seeds, duration_ms)
    if isinstance(runs, Verdict):
        return runs
    worst, kept = lost(runs, services)
    if kept >= attainment:
        return right(f"It keeps the rules, and {worst}, which fares worst, keeps {kept:.1%} of its requests within SLO.")
    return wrong(f"It keeps the rules, but {worst} keeps only {kept:.1%} of its requests within SLO. {_why(runs, worst)}")


def check_beats(
    answer: object,
    services: Sequence[Service],
    profile: Profile,
    ratio: float = 1.1,
    rival: Policy | None = None,
    *,
    seeds: Iterable[int] = SEEDS,
    duration_ms: float = DURATION_MS,
) -> Verdict:
    """Judge whether a policy answers `ratio` times as many requests in time as a rival, all seeds together.

    Parameters
    ----------
    answer : Policy
    services : sequence of Service
    profile : Profile
    ratio : float
        Of the goodputs.
    rival : Policy, optional
        ``Temporal(drop_late=True)`` by default.
    seeds, duration_ms
        Of the runs [ms].
    """
    positive("ratio", ratio)
    duel = _duel(answer, services, profile, rival, seeds, duration_ms)
    if isinstance(duel, Verdict):
        return duel
    if duel.reached >= ratio >= 1 and duel.mine == duel.theirs:
        return wrong(
            f"On every seed it answers exactly as many in time as {duel.rival}: a draw, as against itself. Write one of your own."
        )
    if duel.reached >= ratio:
        least = min(a / b for a, b in zip(duel.mine, duel.theirs, strict=True) if b > 0)
        over = f"over {len(duel.mine)} seeds; {least:.2f} times in the worst of them."
        return right(f"{duel.reached:.2f} times {duel.rival}'s goodput {over}")
    worst, kept = lost(duel.runs, services)
    reached = f"{duel.reached:.{5 if ratio - duel.reached < 0.005 else 2}f}"  # a near miss is not rounded to a hit
    return wrong(
        f"{reached} times {duel.rival}'s goodput; {ratio:g} times is asked for. "
        f"{worst} fares worst: {kept:.1%} within SLO. {_why(duel.runs, worst)}"
    )


def check_fair(
    answer: object,
    services: Sequence[Service],
    profile: Profile,
    fairness: float = 0.95,
    rival: Policy | None = None,
    part: float = 0.7,
    *,
    seeds: Iterable[int] = SEEDS,
    duration_ms: float = DURATION_MS,
) -> Verdict:
    """Judge whether a policy shares GPU time fairly and still answers enough: fair by doing nothing does not count.

    Parameters
    ----------
    answer : Policy
    services : sequence of Service
        Of an overload: where everybody can have enough, fairness is easy.
    profile : Profile
    fairness : float
        Jain's index of GPU%·ms over services that has to be reached on every seed.
    rival : Policy, optional
        ``Temporal(drop_late=True)`` by default.
    part : float
        Of the rival's goodput that has to be reached, over all seeds.
    seeds, duration_ms
        Of the runs [ms].
    """
    duel = _duel(answer, services, profile, rival, seeds, duration_ms)
    if isinstance(duel, Verdict):
        return duel
    times = [gpu_time(run).reindex([s.name for s in services], fill_value=0.0) for run in duel.runs]
    indices = [jain(time) for time in times]
    if min(indices) < fairness:
        least = str(times[indices.index(min(indices))].idxmin())
        return wrong(
            f"Jain's index of GPU time falls to {min(indices):.3f}; {fairness:g} is asked for. {least} received least: "
            "let whoever received least GPU%·ms so far go first, and let nobody pass it for long."
        )
    if duel.reached < part:
        worst, _ = lost(duel.runs, services)
        return wrong(
            f"It is fair (Jain's index {min(indices):.3f}), but its goodput is only {duel.reached:.2f} times {duel.rival}'s; "
            f"{part:g} times is asked for. {_why(duel.runs, worst)}"
        )
    return right(f"Jain's index is {min(indices):.3f} or more on every seed, at {duel.reached:.2f} times {duel.rival}'s goodput.")


class _Duel(NamedTuple):
    """Runs of a reader's policy, and the goodputs [requests/s] of it and of its rival, seed by seed."""

    runs: list[Trace]
    mine: list[float]
    theirs: list[float]
    rival: str

    @property
    def reached(self) -> float:
        """Goodput over the rival's, all seeds together."""
        return sum(self.mine) / sum(self.theirs)


def _duel(
    answer: object, services: Sequence[Service], profile: Profile, rival: Policy | None, seeds: Iterable[int], duration_ms: float
) -> _Duel | Verdict:
    """Let a policy and its rival serve the same requests; a verdict says what disqualifies the policy."""
    rival, seeds = Temporal(drop_late=True) if rival is None else rival, tuple(seeds)
    plan = plan_for(services, profile, "efficacy")
    runs = play(answer, plan, seeds, duration_ms)
    if isinstance(runs, Verdict):
        return runs
    theirs = [goodput_rps(simulate(plan, rival, duration_ms, seed)) for seed in seeds]
    require(sum(theirs) > 0, "rival", rival.name, "a policy that answers something in time")
    return _Duel(runs, [goodput_rps(run) for run in runs], theirs, rival.name)


def goodput_rps(run: Trace) -> float:
    """Requests that were answered in time, of all services [requests/s]."""
    return float(summary(run)["goodput_rps"].to_numpy()[-1])


def _why(runs: Sequence[Trace], worst: str) -> str:
    """What the traces say about the service that fares worst."""
    ends = [run.requests[run.requests["service"] == worst]["outcome"].value_counts() for run in runs]
    total = sum(int(counts.sum()) for counts in ends)
    slo_ms = float(runs[0].services.set_index("service")["slo_ms"][worst])
    over = [_late(run, worst, slo_ms) for run in runs]
    late = sum(ms.size for ms in over) / total
    dropped = sum(int(counts.get("dropped", 0)) for counts in ends) / total
    unserved = sum(int(counts.get("unserved", 0)) for counts in ends) / total
    if unserved > 0.2:
        return f"{unserved:.0%} of its requests are never launched: does every service get its turn?"
    if dropped > 0.5:
        return (
            f"{dropped:.0%} of its requests are dropped: too early (drop only what can no longer be in time), or because they "
            "waited too long for their turn."
        )
    if late > 0.2:
        middle = float(np.median(np.concatenate(over)))
        return (
            f"{late:.0%} of its requests are answered too late, half of those by {middle:.3g} ms or less: what counts is when "
            "the batch that a request goes in would end, at that batch's size and share. Drop what that is too late for."
        )
    utilization = sum(float(summary(run)["utilization"].to_numpy()[-1]) for run in runs) / len(runs)
    if utilization < 0.6:
        return f"The GPU is used to {utilization:.0%}: what is free could run another batch."
    return "Who waits while whom is served? Look at the timeline, and drop what can no longer be in time."


def _late(run: Trace, name: str, slo_ms: float) -> NDArray[np.float64]:
    """By how much the late answers of a service were late [ms]."""
    mine = run.requests[run.requests["service"] == name]
    over = (mine["finish_ms"] - mine["arrival_ms"] - slo_ms).to_numpy(dtype=float)
    return over[over > 1e-9]

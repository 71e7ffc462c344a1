"""Exercises on comparisons: intervals, and cases in which D-STACK is not the best choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from dstack_lab.checks import require
from dstack_lab.exercises.base import UNANSWERED, Mistake, Verdict, as_number, graded, right, unanswered, wrong
from dstack_lab.exercises.own_policy import DURATION_MS, SEEDS
from dstack_lab.exercises.referee import as_policy, play
from dstack_lab.experiments import compare, mean_interval
from dstack_lab.metrics import ALL
from dstack_lab.policies import DStack, Policy
from dstack_lab.profiles import Profile
from dstack_lab.services import InfeasiblePlan, Service
from dstack_lab.trials import plan_for

RIVAL = "D-STACK"
#: From this SLO attainment on there is nothing left to win; beyond this part of the bound most policies only drown.
NEARLY, FAR_BEYOND = 0.985, 1.5


def check_interval(answer: object, values: Iterable[float]) -> Verdict:
    """Judge the 95 % interval of the mean of independent runs (Student's t).

    Parameters
    ----------
    answer : number or pair of numbers
        Half the width of the interval, or its two ends.
    values : iterable of float
        What each run gave.
    """
    x = np.asarray(list(values), dtype=float)
    require(x.size > 1 and float(x.std()) > 0, "values", x.tolist(), "2 or more numbers, not all equal")
    mean, low, high = mean_interval(x)
    half = high - mean
    if isinstance(answer, (tuple, list, np.ndarray)) and len(answer) == 2:
        ends = [as_number(end) for end in answer]
        if any(end is None for end in ends):
            return wrong(UNANSWERED if all(unanswered(end) for end in answer) else "Give two numbers: the ends of the interval.")
        first, second = sorted(float(end) for end in ends if end is not None)
        if (first, second) == (float(x.min()), float(x.max())):
            return wrong("Those are the worst and the best run. How well is their mean known?")
        if abs((first + second) / 2 - mean) > 0.05 * half:
            return wrong("The interval lies around the mean of the runs; the middle of yours does not.")
        answer = (second - first) / 2
    spread, rough, n = float(x.std(ddof=1)), float(x.std()), x.size
    one_sided, too_free = (float(stdtrit(n - less, q)) for q, less in ((0.95, 1), (0.975, 0)))
    mistakes = [
        Mistake(
            1.96 * spread / np.sqrt(n), f"1.96 is for many runs. With {n}, Student's t with {n - 1} degrees of freedom is larger."
        ),
        Mistake(
            half * np.sqrt(n), "That is how far a single run may be off. The mean of n runs is better by the square root of n."
        ),
        Mistake(spread / np.sqrt(n), "That is the standard error. Multiply by the quantile of Student's t."),
        Mistake(
            spread, "That is the standard deviation of the runs: how far single runs lie apart, not how well the mean is known."
        ),
        Mistake(mean, "That is the mean itself. How far may it be off?"),
        Mistake(
            one_sided * spread / np.sqrt(n), "An interval has two sides: 2.5 % of the time it may miss on each. Take 97.5 %."
        ),
        Mistake(too_free * spread / np.sqrt(n), f"{n} runs have n - 1 = {n - 1} degrees of freedom: one is spent on their mean."),
        *(
            Mistake(
                factor * rough, f"Divide by n - 1 = {n - 1} in the variance: the mean is estimated from the same runs. {more}"
            )
            for factor, more in (
                (half / spread, ""),
                (1.0, "Then it is the deviation of single runs, not of their mean."),
                (1 / np.sqrt(n), "Then it is the standard error: multiply by the quantile of Student's t."),
                (1.96 / np.sqrt(n), "And 1.96 is for many runs."),
            )
        ),
        Mistake(high - low, "That is the whole width of the interval; give half of it, or its two ends."),
    ]
    why = f"With {n} runs the mean is known to within that, at 95 %. Four times as many runs would halve it."
    hint = "Standard deviation (over n - 1), over the square root of n, times the 97.5 % quantile of Student's t with n - 1."
    return graded(answer, half, "", why, mistakes, hint, rel=0.01)


def check_baseline_wins(
    answer: object, profile: Profile, *, seeds: Iterable[int] = SEEDS, duration_ms: float = DURATION_MS
) -> Verdict:
    """Judge a case in which another policy answers more requests in time than D-STACK does.

    Any policy, any services and any arrivals will do. The difference has to be larger than chance: the 95 %
    interval of the differences, seed by seed, lies above zero. Both drop late requests ("one rule").

    Parameters
    ----------
    answer : (policy, services)
        A policy object other than D-STACK, and a list of services.
    profile : Profile
    seeds, duration_ms
        Of the runs [ms].
    """
    if unanswered(answer) or (isinstance(answer, (tuple, list)) and any(unanswered(part) for part in answer)):
        return wrong(UNANSWERED)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return wrong("Give a pair: a policy, and a list of services.")
    if isinstance(answer[1], Policy) and not isinstance(answer[0], Policy):
        return wrong("The other way round: first the policy, then the services.")
    policy, services = as_policy(answer[0]), _services(answer[1], profile)
    if isinstance(policy, Verdict):
        return policy
    if isinstance(services, str):
        return wrong(services)
    if isinstance(policy, DStack):
        return wrong("That is D-STACK itself, or a kind of it. Find another policy that beats it.")
    try:
        played = play(policy, plan_for(services, profile, "efficacy"), [0], duration_ms)
        if isinstance(played, Verdict):
            return played
        racers = {policy.name: policy, RIVAL: DStack(reject=True)}
        table = compare(services, profile, racers, (1.0,), seeds, duration_ms, admission="one rule", baseline=RIVAL)
    except InfeasiblePlan as error:
        return wrong(f"Nobody can serve this at any share: {error}")
    row = table[(table["policy"] == policy.name) & (table["service"] == ALL)].iloc[0]
    gain, low, high = (float(row[f"goodput_rps_gain{end}"]) for end in ("", "_low", "_high"))
    if np.isnan(gain):
        return wrong(f"D-STACK has no plan for this load, so there is no race: {table['note'].max()}")
    said = f"{gain:+.1f} requests/s in time against D-STACK, 95 % interval {low:+.1f} to {high:+.1f}"
    if low > 0:
        return right(f"{policy.name}: {said}. And what does it cost? Look at who is served, and at Jain's index.")
    if gain > 0:
        return wrong(f"{policy.name}: {said}. The interval holds zero: this may be luck. Make the case clearer.")
    theirs = table[(table["policy"] == RIVAL) & (table["service"] == ALL)].iloc[0]
    if theirs["slo_attainment"] > NEARLY:
        return wrong(
            f"{policy.name}: {said}. At {row['bound_load']:.2f} of the bound D-STACK answers {theirs['slo_attainment']:.1%} in "
            "time: nobody can be clearly better. Where does it have to turn requests away?"
        )
    if row["bound_load"] > FAR_BEYOND:
        return wrong(f"{policy.name}: {said}. {row['bound_load']:.1f} times the bound drowns this policy too: go nearer to 1.")
    return wrong(f"{policy.name}: {said}. What does D-STACK pay for that this policy does not? Fairness is one such thing.")


def _services(answer: Any, profile: Profile) -> Sequence[Service] | str:
    """Services that a reader gave, or what is wrong with them."""
    if isinstance(answer, Service):
        answer = [answer]
    if not isinstance(answer, (list, tuple)) or not answer or not all(isinstance(s, Service) for s in answer):
        return "The second part is a list of lab.Service objects, such as lab.workload('C-4', profile, load=1) gives."
    unknown = [s.model for s in answer if s.model not in profile.models]
    if unknown:
        return f"The profile does not know {', '.join(unknown)}; it knows {', '.join(profile.models)}."
    if len({s.name for s in answer}) < len(answer):
        return "Two services have the same name: give each one of its own."
    return tuple(answer)

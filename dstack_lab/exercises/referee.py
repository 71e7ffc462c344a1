"""The referee of exercises that ask for a policy: runs it on several seeds, and says what disqualifies it.

A policy is judged by what it did, never by how it is written. What is looked for: that it runs, keeps the
rules, launches something, does not drop what it could serve, and decides the same whatever comes later.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dstack_lab.exercises.base import UNANSWERED, Verdict, unanswered, wrong
from dstack_lab.ledger import PolicyError
from dstack_lab.policies import Policy
from dstack_lab.services import InfeasiblePlan, Plan, Service
from dstack_lab.simulator import sample_arrivals, simulate
from dstack_lab.traces import Trace

Array = NDArray[np.float64]

#: The future is cut off at this many instants of a run of so many ms, and replaced by silence and by a burst.
CUTS, CUT_RUN_MS = 10, 400.0
BURST = 40
#: More than 100 GPU% by less than this is rounding.
SLACK_PCT = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Arrivals at given times that say the rate of the process they stand for: what a policy knows stays the same."""

    rate_rps: float
    _times: Array = field(repr=False)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Array:
        """Return the times below `duration_ms` [ms]."""
        return self._times[self._times < duration_ms]


def as_policy(answer: object) -> Policy | Verdict:
    """Return a policy object from what a reader gave, or a hint."""
    if unanswered(answer):
        return wrong(UNANSWERED)
    if isinstance(answer, type) and issubclass(answer, Policy):
        try:
            answer = answer()
        except Exception as error:
            return wrong(f"The class cannot be made without arguments ({_said(error)}). Pass an object of it.")
    if not isinstance(answer, Policy):
        return wrong("Give a policy object: an instance of a class that begins with class MyPolicy(lab.Policy).")
    return answer


def play(answer: object, plan: Plan, seeds: Iterable[int], duration_ms: float) -> list[Trace] | Verdict:
    """Run a policy on a plan once per seed.

    Returns
    -------
    list of Trace, or Verdict
        A verdict says what disqualifies the policy.
    """
    policy = as_policy(answer)
    if isinstance(policy, Verdict):
        return policy
    runs: list[Trace] = []
    for seed in seeds:
        run = _ran(policy, plan, seed, duration_ms)
        if isinstance(run, Verdict):
            return run
        for look in (_idle(run), _touched(run, plan, policy)):
            if look is not None:
                return look
        runs.append(run)
    try:
        knows = foresees(policy, plan)
    except PolicyError as error:  # the burst at the end of such a run is more than it can bear
        return wrong(_explained(error))
    if knows:
        return wrong(
            "It decides differently when only the future differs: it reads what a policy cannot know. "
            "Use what state and its services show; names that begin with an underscore are the engine's."
        )
    return runs


def _ran(policy: Policy, plan: Plan, seed: int, duration_ms: float) -> Trace | Verdict:
    """One run, or a hint that says how it ended."""
    try:
        with _same_luck():
            return simulate(plan, copy.deepcopy(policy), duration_ms, seed)
    except PolicyError as error:
        return wrong(_explained(error))
    except InfeasiblePlan as error:
        return wrong(f"It refuses this load ({error}). A policy that answers nobody does not win: take what can be served.")
    except Exception as error:  # of reset, wait_ms, or a policy that cannot be copied
        return wrong(f"It raised before its first decision: {_said(error)}. Look at its reset and __init__.")


def foresees(policy: Policy, plan: Plan) -> bool:
    """Whether decisions before some instant depend on what comes after it.

    The same past is followed once by silence and once by a burst. A policy that knows only the past launches
    the same until then. One that draws random numbers of its own, differently each time, cannot be judged so.
    """
    past = sample_arrivals(plan, CUT_RUN_MS, seed=7)
    told = [s.rate_rps for s in plan.services]

    def launches(futures: Sequence[Array], cut: float) -> list[tuple[object, ...]]:
        services = tuple(
            replace(s, arrivals=Told(rate, np.concatenate([times[times < cut], future])))
            for s, rate, times, future in zip(plan.services, told, past, futures, strict=True)
        )
        with _same_luck():
            trace = simulate(replace(plan, services=services), copy.deepcopy(policy), CUT_RUN_MS + 1, seed=0)
        early = trace.launches[trace.launches["start_ms"] < cut - 1e-6]
        return [tuple(row) for row in early[["service", "start_ms", "gpu_pct", "batch"]].itertuples(index=False)]

    if policy.oversubscribes:  # the share a launch got is known at its end only: after the cut
        return False
    for cut in np.linspace(0.15, 0.95, CUTS) * CUT_RUN_MS + 0.123:
        silence, burst = np.empty(0), cut + 0.01 * np.arange(1, BURST + 1)
        quiet = launches([silence] * len(past), cut)
        if quiet != launches([burst] * len(past), cut):
            return quiet == launches([silence] * len(past), cut)
    return False


def lost(runs: Sequence[Trace], services: Sequence[Service]) -> tuple[str, float]:
    """Return the service that kept least of its requests within SLO over all runs, and that part."""
    kept = {}
    for service in services:
        good = all_ = 0
        for run in runs:
            mine = run.requests[run.requests["service"] == service.name]
            all_ += len(mine)
            good += int((mine["finish_ms"] - mine["arrival_ms"] <= service.slo_ms + 1e-9).sum())
        kept[service.name] = good / all_ if all_ else 1.0
    worst = min(kept, key=kept.__getitem__)
    return worst, kept[worst]


def _idle(run: Trace) -> Verdict | None:
    """A hint for a policy that did nothing, or nothing but drop."""
    dropped = int((run.requests["outcome"] == "dropped").sum())
    if len(run.launches):
        return None
    if dropped:
        return wrong(
            "It drops requests and launches none. A dropped request is as bad as a late one: drop only what is lost anyway."
        )
    return wrong("It never launches anything. decide has to return a list with lab.Launch(name, gpu_pct, batch) in it.")


def _touched(run: Trace, plan: Plan, policy: Policy) -> Verdict | None:
    """A hint for a policy that changed what it may only read: the books then break a law."""
    launches, requests = run.launches, run.requests
    if policy.oversubscribes or launches.empty:
        return None
    edges = np.concatenate([launches["start_ms"], launches["end_ms"]])
    steps = np.concatenate([launches["gpu_pct"], -launches["gpu_pct"]])
    order = np.lexsort((steps, np.round(edges, 6)))  # ends first
    most = float(np.cumsum(steps[order]).max())
    if most > 100 + SLACK_PCT:
        return wrong(f"Its launches hold {most:.0f} GPU% together. It changed free_pct, which it may only read.")
    tables = dict(zip([s.name for s in plan.services], plan.tables, strict=True))
    took = (launches["end_ms"] - launches["start_ms"]).to_numpy()
    should = [
        tables[n].at(int(b), g) for n, b, g in zip(launches["service"], launches["batch"], launches["gpu_pct"], strict=True)
    ]
    served = requests[requests["outcome"] == "served"]
    if not np.allclose(took, should, atol=1e-5) or bool((served["start_ms"] < served["arrival_ms"] - 1e-6).any()):
        return wrong(
            "Its launches are faster than the GPU, or begin before their requests came. A policy changes nothing in state."
        )
    return None


def _explained(error: PolicyError) -> str:
    """Turn an engine's report into a hint."""
    cause = error.__cause__
    text = str(error)
    if isinstance(cause, NotImplementedError):
        return "It has no decide of its own: write def decide(self, state) and return a list."
    if " raised at " in text:
        return f"{text}. The state there is that of error.trace: run lab.simulate yourself and look at its last launches."
    return f"It broke a rule and was stopped: {text}."


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _same_luck() -> Iterator[None]:
    """Let a policy that uses the global random numbers draw the same ones in each run; give them back afterwards."""
    kept, numpy_kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(numpy_kept)  # noqa: NPY002

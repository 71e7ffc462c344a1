"""Discrete-event engine: plan + policy + seed -> trace, on a virtual clock of integer nanoseconds."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import count, positive, require
from dstack_lab.ledger import Ledger, PolicyError
from dstack_lab.policies.base import Policy
from dstack_lab.provenance import Provenance, versions_here
from dstack_lab.services import Plan
from dstack_lab.state import NEVER_NS, NS_PER_MS, Launch
from dstack_lab.traces import Trace
from dstack_lab.turns import END, READY, RuleBroken, Turns
from dstack_lab.variability import Variability

#: After the last arrival, a run without any launch for this many of the longest SLO is over.
STALL_SLOS = 10


def sample_arrivals(plan: Plan, duration_ms: float, seed: int) -> list[NDArray[np.float64]]:
    """Arrival times of each service [ms]: one seed, one stream per service, whatever the policy."""
    streams = np.random.SeedSequence(seed).spawn(len(plan.services))
    return [s.arrivals.sample(duration_ms, np.random.default_rng(q)) for s, q in zip(plan.services, streams, strict=True)]


def open_ledger(plan: Plan, policy: Policy, duration_ms: float, seed: int) -> Ledger:
    """Check the arguments of a run, reset the policy and open its books.

    Raises
    ------
    ValueError
        Naming the argument, its value and the allowed range.
    InfeasiblePlan
        If the policy cannot schedule the plan.
    """
    require(isinstance(plan, Plan), "plan", type(plan).__name__, "a Plan")
    require(isinstance(policy, Policy), "policy", policy, "a Policy object such as Temporal()")
    positive("duration_ms", duration_ms)
    count("seed", seed, least=0)
    policy.reset(plan)
    waits = [policy.wait_ms(a, s.slo_ms) for a, s in zip(plan.allocations, plan.services, strict=True)]
    return Ledger(plan, sample_arrivals(plan, duration_ms, seed), waits, policy.oversubscribes)


def simulate(plan: Plan, policy: Policy, duration_ms: float, seed: int = 0, variability: Variability | None = None) -> Trace:
    """Simulate `policy` on `plan`.

    Parameters
    ----------
    plan : Plan
    policy : Policy
        Reset at the start; the same object may be used again.
    duration_ms : float
        Requests arrive in [0, duration_ms); the run goes on until they are served or dropped.
    seed : int
        Seed of the arrivals: the same seed gives the same trace, and every policy the same requests.
    variability : Variability, optional
        How service times scatter around their prediction, such as ``Lognormal(cv=0.1)``; by default
        they are as predicted.

    Returns
    -------
    Trace

    Raises
    ------
    ValueError
        If an argument is out of range.
    InfeasiblePlan
        If the policy cannot schedule the plan.
    PolicyError
        If the policy breaks a rule or raises: names the policy, the time and the decision; its
        ``trace`` holds the run so far.
    """
    require(variability is None or isinstance(variability, Variability), "variability", variability, "None or Lognormal(cv=0.1)")
    ledger = open_ledger(plan, policy, duration_ms, seed)
    ledger.factors = None if variability is None else _factors(variability, seed)
    made = plan.provenance
    provenance = Provenance("simulated", made.device, "model", versions_here("dstack-lab", "numpy"), made.date, made.marks)
    try:
        _run(ledger, policy, round(duration_ms * NS_PER_MS))
    except RuleBroken as broken:
        trace = ledger.to_trace(duration_ms, policy.name, seed, provenance)
        raise PolicyError(str(broken), trace) from broken.__cause__
    return ledger.to_trace(duration_ms, policy.name, seed, provenance)


def _factors(variability: Variability, seed: int) -> Iterator[float]:
    """Factors without end, from a stream of their own: arrivals stay those of the seed."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    while True:
        yield from variability.sample(4096, rng).tolist()


def _run(ledger: Ledger, policy: Policy, duration_ns: int) -> None:
    def on_launch(number: int, end: int, _: Launch) -> None:
        heappush(heap, (end, END, number))

    turns = Turns(ledger, policy, on_launch)
    heap, state, finish, happen, take = turns.heap, ledger.state, ledger.finish, turns.happen, turns.take
    running, services, needs_pct = state._running, state.services, policy.needs_pct
    stall_ns = STALL_SLOS * max(view.slo_ns for view in state.services)
    while heap and (ledger.waiting_total or running):
        now, kind, key = heappop(heap)
        if now > duration_ns and not running and (now == NEVER_NS or now > max(duration_ns, turns.launched_ns) + stall_ns):
            break
        state.now_ns = now
        ask = False
        while True:  # everything that happens at this instant
            if kind == END:
                finish(key)
                ask = True
            elif kind == READY:  # as in `happen`, without the call: half of all events
                view = services[key]
                if not view.ready and view._ready_ns == now:
                    view.ready, view.due_ms = True, view.oldest_deadline_ms
                    if state.free_pct >= needs_pct:
                        ask = True
            elif happen(now, kind, key):
                ask = True
            if not heap or heap[0][0] != now:
                break
            _, kind, key = heappop(heap)
        if ask:
            take()

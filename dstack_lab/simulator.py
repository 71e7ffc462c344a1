"""Discrete-event engine: plan + policy + seed -> trace, on a virtual clock of integer nanoseconds.

Order of events at one instant, which makes every run repeatable: (1) batches end, in the order they
were launched; (2) batches become ready, by service; (3) wake-ups; (4) arrivals, for policies that ask
for them. Then the policy decides once. A wake-up that it asks for at that same instant gives it one
more turn, `TURNS` times at most.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import count, positive, require
from dstack_lab.ledger import Ledger, PolicyError
from dstack_lab.policies.base import Policy
from dstack_lab.provenance import Provenance, versions_here
from dstack_lab.services import Plan
from dstack_lab.state import NEVER_NS, NS_PER_MS, Drop, Launch, Wake
from dstack_lab.traces import Trace

END, READY, WAKE, ARRIVAL = range(4)
#: Turns of a policy at one instant before it is stopped as endless.
TURNS = 1000
#: After the last arrival, a run without any launch for this many of the longest SLO is over.
STALL_SLOS = 10


def sample_arrivals(plan: Plan, duration_ms: float, seed: int) -> list[NDArray[np.float64]]:
    """Arrival times of each service [ms]: one seed, one stream per service, whatever the policy."""
    streams = np.random.SeedSequence(seed).spawn(len(plan.services))
    return [s.arrivals.sample(duration_ms, np.random.default_rng(q)) for s, q in zip(plan.services, streams, strict=True)]


def simulate(plan: Plan, policy: Policy, duration_ms: float, seed: int = 0) -> Trace:
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

    Returns
    -------
    Trace

    Raises
    ------
    PolicyError
        If the policy breaks a rule or raises: names the policy, the time and the decision; its
        ``trace`` holds the run so far.
    """
    require(isinstance(plan, Plan), "plan", type(plan).__name__, "a Plan")
    require(isinstance(policy, Policy), "policy", policy, "a Policy object such as Temporal()")
    duration_ms, seed = positive("duration_ms", duration_ms), count("seed", seed, least=0)
    policy.reset(plan)
    waits = [policy.wait_ms(a, s.slo_ms) for a, s in zip(plan.allocations, plan.services, strict=True)]
    ledger = Ledger(plan, sample_arrivals(plan, duration_ms, seed), waits, policy.oversubscribes)
    made = plan.provenance
    provenance = Provenance("simulated", made.device, made.mechanism, versions_here("dstack-lab", "numpy"), made.date, made.marks)
    try:
        _run(ledger, policy, round(duration_ms * NS_PER_MS))
    except _Broken as broken:
        trace = ledger.to_trace(duration_ms, policy.name, seed, provenance)
        raise PolicyError(str(broken), trace) from broken.__cause__
    return ledger.to_trace(duration_ms, policy.name, seed, provenance)


class _Broken(Exception):
    """A rule was broken; becomes a `PolicyError` once the trace is written."""


def _run(ledger: Ledger, policy: Policy, duration_ns: int) -> None:
    state, decide, finish, launch, refresh = ledger.state, policy.decide, ledger.finish, ledger.launch, ledger.refresh
    services, running, needs_pct = state.services, state._running, policy.needs_pct
    heap: list[tuple[int, int, int]] = []  # (time, kind, launch or service)
    for view in services:
        if (at := refresh(view)) >= 0:
            heappush(heap, (at, READY, view.index))
        if policy.every_arrival:
            heappush(heap, (view._arrivals[0], ARRIVAL, view.index))
    stall_ns = STALL_SLOS * max(view.slo_ns for view in services)
    heappush(heap, (0, WAKE, 0))  # the policy's first turn
    last, turns, launched_ns = -1, 0, 0
    while heap and (ledger.waiting_total or running):
        now, kind, key = heappop(heap)
        if now > duration_ns and not running and (now == NEVER_NS or now > max(duration_ns, launched_ns) + stall_ns):
            break
        state.now_ns = now
        called = False
        while True:  # everything that happens at this instant
            if kind == END:
                finish(key)
                called = True
            elif kind == READY:
                view = services[key]
                if view._ready_ns == now and not view.ready:  # else its head has moved on since
                    view.ready = True
                    called = called or state.free_pct >= needs_pct
            else:
                called = True
                if kind == ARRIVAL:
                    _next_arrival(heap, services[key], now)
            if not heap or heap[0][0] != now:
                break
            _, kind, key = heappop(heap)
        if not called:
            continue
        try:
            decisions = decide(state)
        except Exception as error:
            raise _Broken(f"{policy.name} raised at {state.now_ms:.6f} ms: {error!r}") from error
        if not decisions:
            continue
        turns = turns + 1 if now == last else 0
        last = now
        if turns > TURNS:
            raise _Broken(f"{policy.name} at {state.now_ms:.6f} ms: {decisions[0]}: more than {TURNS} turns at one instant")
        for decision in decisions:
            try:
                if type(decision) is Launch:
                    number, end = launch(decision)
                    heappush(heap, (end, END, number))
                    view = state.by_name[decision[0]]
                    launched_ns = now
                elif type(decision) is Wake:
                    at = round(decision.at_ms * NS_PER_MS)
                    if at < now:
                        raise ValueError(f"at_ms must not be before now, {state.now_ms}")
                    heappush(heap, (at, WAKE, 0))
                    continue
                elif type(decision) is Drop:
                    view = ledger.drop(decision)
                else:
                    raise ValueError("a decision must be a Launch, Drop or Wake")
            except (ValueError, TypeError, OverflowError) as error:
                raise _Broken(f"{policy.name} at {state.now_ms:.6f} ms: {decision}: {error}") from error
            if (at := refresh(view)) >= 0:
                heappush(heap, (at, READY, view.index))


def _next_arrival(heap: list[tuple[int, int, int]], view, now: int) -> None:  # type: ignore[no-untyped-def]
    """Queue the first arrival after `now`; only for policies with ``every_arrival``."""
    position = view._head + view.waiting
    if view._arrivals[position] != NEVER_NS:
        heappush(heap, (view._arrivals[position], ARRIVAL, view.index))

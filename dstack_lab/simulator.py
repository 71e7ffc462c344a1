"""Discrete-event engine: plan + policy + seed -> trace, on a virtual clock of integer nanoseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import count, non_negative, positive, require
from dstack_lab.compiled import LEFT_TO_PYTHON, Engine, choose, simulate_compiled
from dstack_lab.contention import Contention, Load
from dstack_lab.ledger import Ledger, PolicyError
from dstack_lab.policies.base import Policy
from dstack_lab.provenance import Provenance, versions_here
from dstack_lab.services import Allocation, Plan, Service
from dstack_lab.state import NEVER_NS, NS_PER_MS, Launch
from dstack_lab.traces import Trace
from dstack_lab.turns import END, READY, RuleBroken, Turns
from dstack_lab.variability import Variability

#: After the last arrival, a run without any launch for this many of the longest SLO is over.
STALL_SLOS = 10


def sample_arrivals(plan: Plan, duration_ms: float, seed: int) -> list[NDArray[np.float64]]:
    """Arrival times of each service of a plan [ms]; see `draw_arrivals`."""
    return draw_arrivals(plan.services, duration_ms, seed)


def draw_arrivals(services: Sequence[Service], duration_ms: float, seed: int) -> list[NDArray[np.float64]]:
    """Arrival times of each service [ms]: one seed, one stream per service, whatever the policy."""
    streams = np.random.SeedSequence(seed).spawn(len(services))
    return [s.arrivals.sample(duration_ms, np.random.default_rng(q)) for s, q in zip(services, streams, strict=True)]


def open_ledger(plan: Plan, policy: Policy, duration_ms: float, seed: int) -> Ledger:
    """Check the arguments of a run, reset the policy and open its books.

    Raises
    ------
    ValueError
        Naming the argument, its value and the allowed range.
    InfeasiblePlan
        If the policy cannot schedule the plan.
    """
    _check(plan, policy, duration_ms, seed)
    if (rewrite := getattr(policy, "rewrite", None)) is not None:  # an ideal schedules other launches than a plan's
        plan = rewrite(plan)
    policy.reset(plan)
    non_negative(f"needs_pct of {policy.name}", policy.needs_pct)
    waits = [_wait(policy, a, s.slo_ms) for a, s in zip(plan.allocations, plan.services, strict=True)]
    return Ledger(plan, sample_arrivals(plan, duration_ms, seed), waits, policy.oversubscribes)


def _wait(policy: Policy, allocation: Allocation, slo_ms: float) -> float:
    wait: object = policy.wait_ms(allocation, slo_ms)
    known = isinstance(wait, (int, float, np.number)) and not np.isnan(wait)
    require(known, f"wait_ms of {policy.name} for {allocation.service}", wait, "a number of ms")
    return float(wait)  # type: ignore[arg-type]


def _check(plan: Plan, policy: Policy, duration_ms: float, seed: int) -> None:
    require(isinstance(plan, Plan), "plan", type(plan).__name__, "a Plan")
    require(isinstance(policy, Policy), "policy", policy, "a Policy object such as Temporal()")
    positive("duration_ms", duration_ms)
    count("seed", seed, least=0)


def simulate(
    plan: Plan,
    policy: Policy,
    duration_ms: float,
    seed: int = 0,
    variability: Variability | None = None,
    contention: Contention | None = None,
    engine: Engine = "auto",
) -> Trace:
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
    contention : Contention, optional
        What launches cost each other. By default what the plan knows of; if that is nothing, nothing on shares
        that fit side by side, and ``Contention()`` for a policy that oversubscribes the GPU.
    engine : {"auto", "python", "compiled"}
        "compiled" gives the same trace, an order of magnitude sooner, for `DStack` and `Temporal` where
        numba is installed, without `variability` and `contention`. "auto" compiles runs of more than a
        million requests; where it cannot, ``provenance.marks`` of the trace says why.

    Returns
    -------
    Trace
        Of a policy that oversubscribes, ``gpu_pct`` is not the share a launch asked for but what it
        got on average: of the share it could use, the part of the time that it ran.

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
    require(contention is None or isinstance(contention, Contention), "contention", contention, "None or Contention()")
    _check(plan, policy, duration_ms, seed)
    contention = plan.contention if contention is None else contention
    as_predicted = variability is None and contention is None and not policy.oversubscribes
    compiled, marks = choose(engine, plan, policy, duration_ms, as_predicted)
    made = plan.provenance
    versions = versions_here("dstack-lab", "numpy")
    provenance = Provenance("simulated", made.device, "model", versions, made.date, (*made.marks, *marks))
    if compiled:
        policy.reset(plan)
        arrivals = sample_arrivals(plan, duration_ms, seed)
        trace = simulate_compiled(plan, policy, duration_ms, seed, arrivals, STALL_SLOS, provenance)
        if trace is not None:
            return trace
        provenance = replace(provenance, marks=(*provenance.marks, LEFT_TO_PYTHON))
    ledger = open_ledger(plan, policy, duration_ms, seed)
    if contention is None and ledger.oversubscribe:
        contention = Contention()
    ledger.factors = None if variability is None else _factors(variability, seed)
    try:
        if contention is None:
            _run(ledger, policy, round(duration_ms * NS_PER_MS))
        else:
            _run_beside(ledger, policy, round(duration_ms * NS_PER_MS), contention)
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
                    view.become_ready()
                    if state.free_pct >= needs_pct:
                        ask = True
            elif happen(now, kind, key):
                ask = True
            if not heap or heap[0][0] != now:
                break
            _, kind, key = heappop(heap)
        if ask:
            take()


def _run_beside(ledger: Ledger, policy: Policy, duration_ns: int, contention: Contention) -> None:
    """As `_run`, with ends that move whenever a launch starts or ends: slower, so apart from it."""

    def on_launch(number: int, end: int, _: Launch) -> None:
        crowd.join(number, end)

    turns = Turns(ledger, policy, on_launch)
    heap, state = turns.heap, ledger.state
    crowd = _Crowd(ledger, contention, heap)
    stall_ns = STALL_SLOS * max(view.slo_ns for view in state.services)
    while heap and (ledger.waiting_total or state._running):
        now = heap[0][0]
        if now > duration_ns and not state._running and (now == NEVER_NS or now > max(duration_ns, turns.launched_ns) + stall_ns):
            break
        state.now_ns = now
        ask = False
        while heap and heap[0][0] == now:
            _, kind, key = heappop(heap)
            ask = (crowd.leave(key) if kind == END else turns.happen(now, kind, key)) or ask
        if ask:
            turns.take()
        crowd.retime()


class _Crowd:
    """Launches that run beside each other: how much of each is left, and when it will end."""

    def __init__(self, ledger: Ledger, contention: Contention, heap: list[tuple[int, int, int]]) -> None:
        self._ledger, self._contention, self._heap = ledger, contention, heap
        self._loads: dict[int, Load] = {}  # by number of the launch, as `_left`, `_pace` and `_ends`
        self._left: dict[int, float] = {}  # time alone that is still to run [ns], at `_since_ns`
        self._pace: dict[int, float] = {}  # time alone per time beside the others
        self._ends: dict[int, int] = {}
        self._whole: dict[int, float] = {}
        self._since_ns = 0
        self._changed = False
        self._knees: dict[tuple[int, int], float] = {}

    def join(self, number: int, end: int) -> None:
        view, share, batch, start, predicted = self._ledger.state._running[number]
        table = self._ledger.plan.tables[view.index]
        knee = self._knees.get((view.index, batch))
        if knee is None:
            knee = self._knees[view.index, batch] = table.knee_pct(batch)
        self._loads[number] = Load(table, batch, share, (predicted - start) / NS_PER_MS, min(knee, share))
        self._whole[number] = end - start
        self._changed = True

    def leave(self, number: int) -> bool:
        """End a launch, unless its end has moved since this event was queued."""
        now = self._ledger.state.now_ns
        if self._ends.get(number) != now:
            return False
        whole, knee = self._whole.pop(number), self._loads.pop(number).knee_pct
        start = self._ledger.state._running[number][3]
        granted = knee * min(whole / (now - start), 1.0) if self._ledger.oversubscribe else None
        self._ledger.finish(number, now, granted)
        for book in (self._left, self._pace, self._ends):
            del book[number]
        self._changed = True
        return True

    def retime(self) -> None:
        """After launches have started or ended, move the ends of those that run."""
        if not self._changed:
            return
        self._changed = False
        now, left, pace = self._ledger.state.now_ns, self._left, self._pace
        gone, self._since_ns = now - self._since_ns, now
        for number, stretch in zip(self._loads, self._contention.stretch([*self._loads.values()]), strict=True):
            before = pace.get(number)
            left[number] = self._whole[number] if before is None else max(left[number] - gone * before, 0.0)
            pace[number] = new = 1 / stretch
            if new != before:
                self._ends[number] = end = max(now + round(left[number] / new), now + 1)
                heappush(self._heap, (end, END, number))

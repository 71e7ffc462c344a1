"""The engine against queueing theory, conservation laws and its own specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.policies import Drop, Launch, Policy, Wake
from dstack_lab.services import ServiceTable


def queue(rate_rps: float, service_ms: float):
    """One service, one request at a time on the whole GPU."""
    times = ServiceTable(np.full((1, 100), service_ms))
    return plan(("queue", 1e6, lab.Poisson(rate_rps), 100.0, 1, times))


def waits(trace: lab.Trace) -> np.ndarray:
    return (trace.requests["start_ms"] - trace.requests["arrival_ms"]).to_numpy()


def interval(values: np.ndarray, batches: int = 40) -> tuple[float, float]:
    """Mean and 4 standard errors by batch means: the values of a queue depend on each other."""
    means = [part.mean() for part in np.array_split(values, batches)]
    return float(np.mean(means)), 4 * float(np.std(means, ddof=1)) / math.sqrt(batches)


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_md1_wait(load):
    trace = lab.simulate(queue(1000 * load, 1.0), lab.Temporal(), 150_000, seed=1)
    mean, error = interval(waits(trace))
    assert mean == pytest.approx(load / (2 * (1 - load)), abs=error)
    assert error < 0.5 * mean  # an interval that admits anything proves nothing


@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_mm1_sojourn_and_its_tail(load):
    trace = lab.simulate(queue(1000 * load, 1.0), lab.Temporal(), 150_000, seed=2, variability=lab.Exponential())
    sojourn = (trace.requests["finish_ms"] - trace.requests["arrival_ms"]).to_numpy()
    mean, error = interval(sojourn)
    assert mean == pytest.approx(1 / (1 - load), abs=error)
    above, error = interval((sojourn > math.log(10) / (1 - load)).astype(float))
    assert above == pytest.approx(0.1, abs=error)  # the sojourn time of M/M/1 is exponential


@pytest.mark.parametrize("cv", [0.5, 2.0])
def test_mg1_wait_is_pollaczek_khinchine(cv):
    trace = lab.simulate(queue(600, 1.0), lab.Temporal(), 250_000, seed=3, variability=lab.Lognormal(cv))
    mean, error = interval(waits(trace))
    assert mean == pytest.approx(0.6 * (1 + cv**2) / (2 * 0.4), abs=error)


def test_an_unstable_queue_grows_without_limit():
    trace = lab.simulate(queue(1250, 1.0), lab.Temporal(), 100_000, seed=4)
    wait = waits(trace)
    assert wait[-1] == pytest.approx(0.25 * 100_000, rel=0.06)  # work arrives 1.25 times as fast as it leaves
    assert wait[len(wait) // 2] == pytest.approx(wait[-1] / 2, rel=0.1)
    busy = (trace.launches["end_ms"] - trace.launches["start_ms"]).sum() / trace.launches["end_ms"].max()
    assert busy == pytest.approx(1, abs=0.01)


def test_two_services_at_once_are_two_queues():
    """Shares that fit side by side do not wait for each other: each is an M/D/1 of its own."""
    times = ServiceTable(np.full((1, 100), 1.0))
    both = plan(*[(name, 1e6, lab.Poisson(rate), 50.0, 1, times) for name, rate in (("a", 500), ("b", 800))])

    class Halves(Policy):
        def decide(self, state):
            return [Launch(s.name, 50, 1) for s in state.services if s.ready and not s.in_flight]

    trace = lab.simulate(both, Halves(), 150_000, seed=5)
    for name, load in (("a", 0.5), ("b", 0.8)):
        rows = trace.requests[trace.requests["service"] == name]
        mean, error = interval((rows["start_ms"] - rows["arrival_ms"]).to_numpy())
        assert mean == pytest.approx(load / (2 * (1 - load)), abs=error)


class Wild(Policy):
    """Legal but senseless decisions from a seed: what the engine must survive."""

    oversubscribes = False

    def __init__(self, seed: int, every_arrival: bool) -> None:
        self.seed, self.every_arrival = seed, every_arrival

    def reset(self, plan):
        self.rng = np.random.default_rng(self.seed)

    def wait_ms(self, allocation, slo_ms):
        return float(self.rng.choice([0.0, slo_ms / 2, math.inf]))

    def decide(self, state):
        decisions, free = [], state.free_pct
        for service in self.rng.permutation(np.array(state.services, dtype=object)):
            waiting, share = service.waiting, float(self.rng.choice([1, 12.5, 25, 50, 100]))
            if waiting and self.rng.random() < 0.2:
                decisions.append(Drop(service.name, 1 + int(self.rng.integers(waiting))))
            elif waiting and share <= free:
                free -= share
                decisions.append(Launch(service.name, share, 1 + int(self.rng.integers(min(waiting, service.batch_max)))))
        if self.rng.random() < 0.3:
            decisions.append(Wake(state.now_ms + float(self.rng.exponential(5))))
        return decisions


def policies(seed: int):
    return [Wild(seed, False), Wild(seed, True), lab.Temporal(), lab.Temporal(drop_late=True), lab.DStack(reject=True),
            lab.DStack(planned=False, fair=False, reject=True)]  # fmt: skip


@st.composite
def plans(draw):
    points = []
    for i in range(draw(st.integers(1, 4))):
        rate = draw(st.floats(1, 400))
        arrivals = draw(
            st.sampled_from([lab.Poisson(rate), lab.Gamma(rate, 3), lab.Deterministic(rate), lab.Replay([5.0, 5.0, 5.0])])
        )
        times = table(
            draw(st.floats(0.1, 5)), draw(st.floats(0.01, 2)), draw(st.floats(5, 100)), batch_max=draw(st.integers(2, 12))
        )
        share, batch = draw(st.sampled_from([25.0, 50.0, 75.0, 100.0])), draw(st.integers(1, times.batch_max))
        points.append((f"s{i}", draw(st.floats(40, 200)), arrivals, share, batch, times))
    return plan(*points)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), which=st.integers(0, 5), seed=st.integers(0, 1000))
def test_conservation(plan, which, seed):
    """Every request is served or dropped once, shares fit at every instant, and a seed fixes the trace."""
    policy = policies(seed)[which]
    try:
        trace = lab.simulate(plan, policy, 400, seed)
    except lab.InfeasiblePlan:
        assert isinstance(policy, lab.DStack)
        return
    requests, launches = trace.requests, trace.launches
    served = requests[requests["outcome"] == "served"]
    assert (served["start_ms"] >= served["arrival_ms"]).all()
    assert served["finish_ms"].notna().all()
    assert requests.loc[requests["outcome"] != "served", "finish_ms"].isna().all()
    per_launch = served.groupby("launch").size()
    assert per_launch.to_dict() == launches.set_index("launch")["batch"].to_dict()
    joined = served.merge(launches, on="launch", suffixes=("", "_launch"))
    assert (joined["service"].astype(str) == joined["service_launch"].astype(str)).all()
    assert (joined["start_ms"] == joined["start_ms_launch"]).all()
    for service, allocation in zip(plan.services, plan.allocations, strict=True):
        mine = requests[requests["service"] == service.name]
        assert mine["arrival_ms"].is_monotonic_increasing
        handled = mine[mine["outcome"] == "served"]["launch"].to_numpy()
        assert (np.diff(handled) >= 0).all()  # first come, first served within a service
        assert allocation.service == service.name
    if not isinstance(policy, Wild):
        assert (requests["outcome"] != "unserved").all()
    edges = np.unique(launches[["start_ms", "end_ms"]].to_numpy())
    starts, ends, share = (launches[c].to_numpy() for c in ("start_ms", "end_ms", "gpu_pct"))
    for at in edges:
        assert share[(starts <= at) & (at < ends)].sum() <= 100 + 1e-6
    again = lab.simulate(plan, policies(seed)[which], 400, seed)
    assert again.requests.equals(requests)
    assert again.launches.equals(launches)


class Watches(Wild):
    """Compares what could start with what the views say, at every turn."""

    def decide(self, state):
        waits = {view.index: view for view in state.services if view.ready and not view.in_flight}
        assert state.startable == waits
        return super().decide(state)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), which=st.integers(0, 1000), parted=st.booleans())
def test_what_can_start_is_what_is_ready_and_not_in_flight(plan, which, parted):
    contention = None if parted else lab.Contention()
    lab.simulate(plan, Watches(which, every_arrival=False), 200, seed=1, contention=contention)


def test_the_same_seed_gives_every_policy_the_same_requests():
    both = plan(("a", 50, lab.Poisson(200), 50.0, 4, table()), ("b", 50, lab.Gamma(100, 2), 50.0, 4, table()))
    first, second = (lab.simulate(both, policy, 2000, seed=7).requests for policy in (lab.Temporal(), lab.DStack()))
    assert first["arrival_ms"].equals(second["arrival_ms"])
    third = lab.simulate(both, lab.Temporal(), 2000, seed=7, variability=lab.Lognormal(0.5)).requests
    assert first["arrival_ms"].equals(third["arrival_ms"])
    assert not first["arrival_ms"].equals(lab.simulate(both, lab.Temporal(), 2000, seed=8).requests["arrival_ms"])


class Log(Policy):
    """Serves one request at a time and writes down each of its turns."""

    def __init__(self, wait: float = 0.0, every_arrival: bool = False, wakes: tuple[float, ...] = ()) -> None:
        self.wait, self.every_arrival, self.wakes = wait, every_arrival, wakes

    def reset(self, plan):
        self.log: list = []
        self.asked = False

    def wait_ms(self, allocation, slo_ms):
        return self.wait

    def decide(self, state):
        self.log.append((state.now_ms, [s.waiting for s in state.services], [s.ready for s in state.services], state.free_pct))
        wakes = [] if self.asked else [Wake(t) for t in self.wakes]
        self.asked = True
        ready = [s for s in state.services if s.ready]
        if ready and state.free_pct == 100:
            return [*wakes, Launch(ready[0].name, 100, ready[0].queued(ready[0].batch))]
        return wakes


FLAT = ServiceTable(np.full((4, 100), 10.0))


def test_the_engine_asks_only_when_something_changed():
    one = plan(("a", 100, lab.Replay([1, 2, 3, 30, 50]), 100.0, 2, FLAT))
    policy = Log(wait=5)
    lab.simulate(one, policy, 100)
    assert policy.log == [
        (0, [0], [False], 100),  # the first turn
        (2, [2], [True], 100),  # a batch is full
        (8, [1], [True], 0),  # the third request has waited 5 ms
        (12, [1], [True], 100),  # the first batch ends
        (22, [0], [False], 100),  # the second ends
        (35, [1], [True], 100),  # the fourth has waited
        (45, [0], [False], 100),
        (55, [1], [True], 100),
        (65, [0], [False], 100),
    ]


def test_events_of_one_instant_are_one_turn_in_a_fixed_order():
    """A batch ends, another becomes ready and a wake-up comes at 20 ms: one turn that sees all three."""
    two = plan(("a", 100, lab.Replay([10]), 100.0, 1, FLAT), ("b", 100, lab.Replay([20]), 100.0, 1, FLAT))
    policy = Log(wakes=(20.0,))
    trace = lab.simulate(two, policy, 100)
    assert [turn for turn in policy.log if turn[0] == 20] == [(20, [0, 1], [False, True], 100)]
    assert trace.launches["start_ms"].tolist() == [10, 20]


def test_every_arrival_wakes_a_policy_that_asks():
    one = plan(("a", 100, lab.Replay([1, 2, 3, 30]), 100.0, 4, FLAT))
    policy = Log(wait=1000, every_arrival=True)
    lab.simulate(one, policy, 100)
    assert [turn[0] for turn in policy.log] == [0, 1, 2, 3, 30, 40]  # at 30 the batch is full, at 40 it ends
    assert [turn[1][0] for turn in policy.log] == [0, 1, 2, 3, 4, 0]


def test_what_is_never_launched_is_unserved_and_the_run_ends():
    class Idle(Policy):
        def decide(self, state):
            return [Wake(state.now_ms + 1)]

    trace = lab.simulate(plan(("a", 20, lab.Replay([1, 2]), 100.0, 4, FLAT)), Idle(), 100)
    assert trace.requests["outcome"].tolist() == ["unserved", "unserved"]
    assert lab.summary(trace)["unserved"].tolist() == [2, 2]


class Says(Policy):
    def __init__(self, *decisions):
        self.decisions = decisions

    def decide(self, state):
        return list(self.decisions) if state["a"].waiting else []


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Launch("a", 101, 1), "gpu_pct must be from 1 to the 100 % that are free"),
        (Launch("a", 0, 1), "gpu_pct must be"),
        (Launch("a", float("nan"), 1), "gpu_pct must be"),
        (Launch("b", 50, 1), r"service must be one of \['a'\]"),
        (Launch("a", 50, 2), "batch must be at most the 1 requests that wait"),
        (Launch("a", 50, 0), "batch must be 1 to 4"),
        (Launch("a", 50, 5), "batch must be 1 to 4"),
        (Launch("a", 50, 1.5), "Launch"),
        (Launch("a", "half", 1), "Launch"),
        (Drop("a", 2), "requests must be 1 to the 1"),
        (Drop("z", 1), "service must be"),
        (Wake(0.5), "at_ms must not be before now"),
        (Wake(float("inf")), "Wake"),
        ("go", "must be a Launch, Drop or Wake"),
    ],
)
def test_a_policy_that_breaks_a_rule_is_stopped_and_named(decision, message):
    with pytest.raises(lab.PolicyError, match=f"Says at 1.000000 ms: .*{message}") as caught:
        lab.simulate(plan(("a", 50, lab.Replay([1, 2]), 100.0, 4, FLAT)), Says(decision), 10)
    assert len(caught.value.trace.requests) == 2


def test_oversubscription_must_be_declared():
    with pytest.raises(lab.PolicyError, match="40 % that are free"):
        lab.simulate(plan(("a", 50, lab.Replay([1, 1]), 100.0, 4, FLAT)), Says(Launch("a", 60, 1), Launch("a", 60, 1)), 10)


def test_a_policy_that_raises_or_never_ends_hands_back_the_trace_so_far():
    class Raises(Policy):
        def decide(self, state):
            if state.now_ms > 20:
                raise KeyError("oops")
            return [Launch("a", 100, 1)] if state["a"].waiting else []

    class Endless(Policy):
        def decide(self, state):
            return [Wake(state.now_ms)]

    one = plan(("a", 50, lab.Replay([1, 15, 30]), 100.0, 4, FLAT))
    with pytest.raises(lab.PolicyError, match=r"Raises raised at 25\.000000 ms: KeyError\('oops'\)") as caught:
        lab.simulate(one, Raises(), 100)
    assert caught.value.trace.requests["outcome"].tolist() == ["served", "served", "unserved"]
    with pytest.raises(lab.PolicyError, match=r"Endless at 0\.000000 ms: .*more than 1000 turns at one instant"):
        lab.simulate(one, Endless(), 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": None}, "plan = 'NoneType'"),
        ({"policy": "DStack"}, "policy = 'DStack'"),
        ({"duration_ms": 0}, "duration_ms = 0"),
        ({"duration_ms": float("inf")}, "duration_ms"),
        ({"seed": -1}, "seed = -1"),
        ({"variability": 0.1}, "variability"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {"plan": queue(100, 1.0), "policy": lab.Temporal(), "duration_ms": 100, "seed": 0}
    with pytest.raises(ValueError, match=message):
        lab.simulate(**{**good, **arguments})

"""The compiled engine against the Python engine, bit for bit, and when it is chosen."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from slot_builders import asks, cut, takes

import dstack_lab as lab
from dstack_lab import compiled, simulator
from dstack_lab.policies import Policy
from dstack_lab.policies.slots import Slots

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is optional")


def assert_same(plan: lab.Plan, policy: Policy, duration_ms: float, seed: int = 0) -> lab.Trace | None:
    """Return the one trace of both engines; None if the policy cannot schedule the plan."""
    try:
        expected = lab.simulate(plan, policy, duration_ms, seed, engine="python")
    except lab.InfeasiblePlan:
        with pytest.raises(lab.InfeasiblePlan):
            lab.simulate(plan, policy, duration_ms, seed, engine="compiled")
        return None
    policy.reset(plan)
    arrivals = simulator.sample_arrivals(plan, duration_ms, seed)
    found = compiled.simulate_compiled(plan, policy, duration_ms, seed, arrivals, 10, expected.provenance)
    assert found is not None  # it did not leave the run to the Python engine
    for name in ("services", "requests", "launches", "events"):
        assert_frame_equal(getattr(found, name), getattr(expected, name), check_exact=True)
    for name in ("duration_ms", "policy", "seed"):
        assert getattr(found, name) == getattr(expected, name)
    return found


INSTANTS = st.lists(st.integers(0, 60), min_size=1, max_size=80).map(lambda ticks: lab.Replay([t / 2 for t in sorted(ticks)]))


@st.composite
def plans(draw, largest_rate: float = 600):
    """Up to six services; replayed ones share instants with each other and with ends of batches."""
    points = []
    for i in range(draw(st.integers(1, 6))):
        rate = draw(st.floats(1, largest_rate))
        arrivals = draw(
            st.one_of(st.sampled_from([lab.Poisson(rate), lab.Gamma(rate, 3), lab.Deterministic(round(rate, -1) + 10)]), INSTANTS)
        )
        if draw(st.booleans()):  # whole milliseconds: ties
            times = table(draw(st.integers(1, 5)), draw(st.integers(0, 2)), 25, batch_max=draw(st.integers(2, 12)))
        else:
            times = table(draw(st.floats(0.1, 5)), draw(st.floats(0.01, 2)), draw(st.floats(5, 100)), batch_max=8)
        share, batch = draw(st.sampled_from([25.0, 100 / 3, 50.0, 75.0, 100.0])), draw(st.integers(1, times.batch_max))
        points.append((f"s{i}", draw(st.one_of(st.integers(20, 60), st.floats(10, 200))), arrivals, share, batch, times))
    shares = draw(st.sampled_from([(25.0, 50.0, 75.0, 100.0), (100 / 3, 200 / 3, 100.0), (20.0, 60.0)]))
    made = plan(*points, shares=shares)
    if draw(st.booleans()):  # plan for less than what comes: overload
        part = draw(st.floats(0.05, 1))
        smaller = tuple(replace(a, rate_rps=min(a.rate_rps * part, 40)) for a in made.allocations)
        made = replace(made, allocations=smaller)
    return made


@needs_numba
@settings(max_examples=80, deadline=None)
@given(plan=plans(), drop_late=st.booleans(), seed=st.integers(0, 1000))
def test_temporal_is_the_same_in_both_engines(plan, drop_late, seed):
    assert_same(plan, lab.Temporal(drop_late), 300, seed)


@needs_numba
def test_events_of_one_instant_in_both_engines():
    """At 10 ms a batch ends and both services get a request with the same deadline: the first service goes first."""
    flat = table(10, 0, 1, batch_max=4)
    points = [("a", 100, lab.Replay([10, 10, 10.0]), 50.0, 2, flat), ("b", 100, lab.Replay([0, 10, 10.0]), 50.0, 4, flat)]
    trace = assert_same(plan(*points), lab.Temporal(), 20)
    rows = trace.launches[["start_ms", "service", "batch"]].itertuples(index=False)
    assert [tuple(row) for row in rows] == [(0, "b", 1), (10, "a", 3), (20, "b", 2)]


@needs_numba
@pytest.mark.parametrize("policy", [lab.Temporal(drop_late=True), lab.DStack(reject=True)], ids=["Temporal", "DStack"])
def test_a_log_that_outgrows_its_room(policy):
    """One request a batch: six times as many launches as the log has rows at first."""
    one = plan(("a", 20, lab.Poisson(300), 100.0, 1, table(1, 0.2, 50, batch_max=1)))
    trace = assert_same(one, policy, 20_000, seed=3)
    assert len(trace.launches) > 5000
    assert trace.launches["batch"].max() == 1


@needs_numba
def test_nothing_arrives():
    trace = assert_same(plan(("a", 50, lab.Replay([5.0]), 50.0, 4, table())), lab.Temporal(), 1)
    assert len(trace.requests) == len(trace.launches) == 0


@needs_numba
@settings(max_examples=200, deadline=None)
@given(
    plan=plans(largest_rate=200),
    switches=st.tuples(*[st.booleans()] * 4),
    patience=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_dstack_is_the_same_in_both_engines(plan, switches, patience, seed):
    planned, opportunistic, fair, reject = switches
    assert_same(plan, lab.DStack(planned, opportunistic, fair, patience, reject, pool=False), 400, seed)


@st.composite
def cuts(draw) -> tuple[lab.Plan, Slots]:
    """A plan, and slots as no trial would choose them: unequal, crowded, with room or none for the greedy."""
    made = draw(plans(largest_rate=300))
    count = draw(st.sampled_from([1, 2, 3, 4, 7]))
    shares, copies, greedy = (
        tuple(draw(kind) for _ in made.services)
        for kind in (st.sampled_from([100 / count, 100 / count, 60.0, 100.0]), st.integers(1, 4), st.booleans())
    )
    room = draw(st.sampled_from([100.0, 50.0, 20.0, -10.0]))
    chosen = {"wait_part": draw(st.sampled_from([0.0, 0.1, 0.3])), "worth": draw(st.sampled_from([1.02, 1.5]))}
    slow = tuple(draw(st.sampled_from([1.0, 1.11])) for _ in made.services)
    return made, cut(made, count, copies, gpu_pct=shares, greedy=greedy, greedy_pct=room, slowdown=slow, **chosen)


@needs_numba
@settings(max_examples=200, deadline=None)
@given(case=cuts(), reject=st.booleans(), fair=st.booleans(), seed=st.integers(0, 1000))
def test_slots_are_the_same_in_both_engines(case, reject, fair, seed):
    plan, slots = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dstack_lab.policies.dstack.cut_slots", lambda plan, drop: slots)
        assert_same(plan, lab.DStack(reject=reject, fair=fair), 400, seed)


#: Ties and rules that drawn plans seldom meet: services, slots and what is begun or given up first where a rule decides.
RARE = {
    "has to begin now": ({"x": (12, [3], takes(5)), "y": (10, [0.0] * 3, takes(5))}, 1, {}, [*"yyyx"]),
    "room in one turn": (
        {"g": (50, [0], takes(10)), "h": (51, [0], takes(10)), "m": (60, [0], takes(10))},
        4,
        {"greedy": (True, True, False), "greedy_pct": 25.0},
        [*"gmh"],
    ),
    "no faster": ({"a": (15, [0, 0, 8], takes(0, 5, 3)), "b": (10, [0], takes(10))}, 1, {"worth": 1.0}, [*"baa"]),
    "not worth it": (
        {"a": (16, [0.0] * 20 + [0.5] * 12 + [10.0] * 8, takes(2, 0.5, 20)), "b": (200, [0.0] * 20, takes(2, 0.5, 20))},
        2,
        {"worth": 1.21, "copies": 1},
        [*"abaa"],
    ),
    "waits for room": ({"a": (100, [0, 0, 2], takes(10)), "b": (20, [1], takes(10))}, 4, {"gpu_pct": (25.0, 75.0)}, [*"aaba"]),
}


@needs_numba
@pytest.mark.parametrize("rule", RARE)
def test_rare_decisions_are_the_same_in_both_engines(rule, monkeypatch):
    services, count, fields, order = RARE[rule]
    made = asks(**services)
    monkeypatch.setattr("dstack_lab.policies.dstack.cut_slots", lambda plan, drop: cut(plan, count, **fields))
    drops = "worth" in fields
    assert [*assert_same(made, lab.DStack(reject=drops), 100).launches["service"]] == order


@needs_numba
@settings(max_examples=15, deadline=None)
@given(plan=plans(largest_rate=300), reject=st.booleans(), fair=st.booleans(), seed=st.integers(0, 1000))
def test_slots_that_a_trial_chose_are_the_same_in_both_engines(plan, reject, fair, seed):
    assert_same(plan, lab.DStack(reject=reject, fair=fair), 400, seed)


@needs_numba
@pytest.mark.parametrize(("workload", "load"), [("C-4", 0.72), ("C-7", 0.65), ("C-7", 1.5)])
def test_workloads_in_slots_are_the_same_in_both_engines(workload, load):
    """Many slots, services in several at once and, beyond the bound, requests that are given up."""
    profile = lab.load_profile("v100-simulated")
    shares = lab.gpu_specs.SPECS["v100"].shares()
    made = lab.optimize(lab.workload(workload, profile, load=load, shares=shares), profile, shares=shares, overload="reject")
    trace = assert_same(made, lab.DStack(reject=True), 3000, seed=1)
    before = trace.launches.groupby("service", observed=True)["end_ms"].shift()
    assert (trace.launches["start_ms"] < before).sum() > 5
    assert ((trace.requests["outcome"] == "dropped").sum() > 100) == (load > 1)


@needs_numba
def test_dstack_with_32_services():
    """More windows and queues than the small plans have; launches of several services in one turn."""
    points = [(f"s{i}", 60 + i, lab.Poisson(20), 25.0, 2, table(0.4, 0.1, 20, batch_max=8)) for i in range(32)]
    trace = assert_same(plan(*points), lab.DStack(patience=2, pool=False), 1000, seed=1)
    assert set(trace.launches["note"]) == {"planned", "opportunistic"}


class Watched(lab.DStack):
    """Counts turns with a window whose time has come but whose share is not free yet."""

    def reset(self, plan):
        super().reset(plan)
        self.turns = 0

    def _fill(self, state, now, launches):
        self.turns += bool(self.blocked)
        super()._fill(state, now, launches)


#: Plans where a launch may end a nanosecond after the start of the window that was to follow it:
#: (SLO, rate, share, batch, fixed and per-item service time, knee) of each service.
TIGHT = """
30 80 75 5 3 0.7 30, 30 60 75 1 3 1/3 30, 30 100 25 1 2 0.7 20, 40 80 25 2 1 0.5 30, 60 40 75 4 2 1 30
60 100 25 5 2 0.7 60, 50 60 50 5 3 0.5 20, 30 100 75 4 1 1/3 20, 30 100 25 2 2 1 60, 60 100 50 5 2 1 30
60 60 75 5 1/3 0.7 20, 40 40 50 6 1 1/3 45, 100 60 25 3 2 1 30, 70 60 75 5 2 1/3 30, 60 40 75 4 2 0.7 20
"""


@needs_numba
def test_windows_that_rounding_blocks_for_a_nanosecond():
    turns = 0
    for line in TIGHT.strip().splitlines():
        rows = [[float(Fraction(word)) for word in row.split()] for row in line.split(",")]
        points = [
            (f"s{i}", slo, lab.Poisson(rate), share, int(batch), table(*times, batch_max=8))
            for i, (slo, rate, share, batch, *times) in enumerate(rows)
        ]
        made, policy = plan(*points), Watched(patience=1, pool=False)
        lab.simulate(made, policy, 1500, 1)
        assert_same(made, lab.DStack(patience=1, pool=False), 1500, 1)
        turns += policy.turns
    assert turns > 0


class Mine(lab.Temporal):
    """Decides as its base does, but nobody can know that."""


@pytest.fixture
def one():
    return plan(("a", 50, lab.Poisson(200), 50.0, 4, table()))


@pytest.fixture
def many(monkeypatch):
    """Runs of 100 requests count as long ones."""
    monkeypatch.setattr(compiled, "MANY", 100)


def spy(monkeypatch) -> list[str]:
    """Names of the policies whose runs were compiled, from now on."""
    seen = []

    def note(plan, policy, *rest):
        seen.append(policy.name)
        return compiled.simulate_compiled(plan, policy, *rest)

    monkeypatch.setattr(simulator, "simulate_compiled", note)
    return seen


@needs_numba
def test_long_runs_are_compiled_and_short_ones_are_not(one, many, monkeypatch):
    seen = spy(monkeypatch)
    assert lab.simulate(one, lab.Temporal(), 400).provenance.marks == ()
    assert seen == []
    for policy in (lab.Temporal(), lab.DStack()):
        made = lab.simulate(one, policy, 1000)
        assert made.provenance.marks == ()
        assert_frame_equal(made.requests, lab.simulate(one, policy, 1000, engine="python").requests)
    assert seen == ["Temporal", "DStack"]


def refuses(name):
    raise ImportError("numpy is too new")


def test_a_long_run_in_python_says_why(one, many, monkeypatch):
    seen = spy(monkeypatch)
    own = lab.Temporal()
    own.decide = lambda state: []
    assert lab.simulate(one, Mine(), 1000).provenance.marks == ("python engine: no compiled form of Mine",)
    assert lab.simulate(one, own, 1000).provenance.marks == ("python engine: no compiled form of Temporal",)
    scattered = lab.simulate(one, lab.Temporal(), 1000, variability=lab.Lognormal(0.1))
    assert scattered.provenance.marks == ("python engine: service times scatter or launches slow each other",)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert lab.simulate(one, lab.Temporal(), 1000).provenance.marks == ("python engine: numba is not installed",)
    monkeypatch.setattr(compiled.importlib, "import_module", refuses)
    assert lab.simulate(one, lab.Temporal(), 1000).provenance.marks == (
        "python engine: numba cannot be imported: numpy is too new",
    )
    assert lab.simulate(one, lab.Temporal(), 1000, engine="python").provenance.marks == ()
    assert seen == []


def test_what_cannot_be_compiled_is_refused_with_the_cure(one, monkeypatch):
    with pytest.raises(ValueError, match=r"engine = 'compiled': must be 'auto' or 'python' \(no compiled form of Mine\)"):
        lab.simulate(one, Mine(), 100, engine="compiled")
    with pytest.raises(ValueError, match="service times scatter"):
        lab.simulate(one, lab.Temporal(), 100, variability=lab.Lognormal(0.1), engine="compiled")
    with pytest.raises(ValueError, match=r"engine = 'fast': must be one of \('auto', 'python', 'compiled'\)"):
        lab.simulate(one, lab.Temporal(), 100, engine="fast")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ValueError, match=r"install numba: pip install dstack-lab\[fast\] \(numba is not installed\)"):
        lab.simulate(one, lab.DStack(), 100, engine="compiled")


@dataclass(frozen=True)
class Given:
    """Arrival times as they are, in whatever order."""

    times: tuple[float, ...]
    rate_rps: float = 10.0

    def sample(self, duration_ms, rng):
        return np.array(self.times)


@needs_numba
@pytest.mark.parametrize("times", [(5.0, 3.0), (-1.0, 3.0)])
def test_a_run_left_to_the_python_engine_says_so(times):
    odd = plan(("a", 50, Given(times), 50.0, 4, table()))
    made, expected = (lab.simulate(odd, lab.Temporal(), 100, engine=engine) for engine in ("compiled", "python"))
    assert made.provenance.marks == (compiled.LEFT_TO_PYTHON,)
    assert_frame_equal(made.requests, expected.requests)


@needs_numba
def test_a_broken_rule_is_told_by_the_python_engine(one):
    """With a negative patience batches are ready before they have come."""
    hasty = lab.DStack(pool=False)
    hasty.patience = -0.1
    with pytest.raises(lab.PolicyError, match=r"DStack raised at .*a batch of 1 to 16") as caught:
        lab.simulate(one, hasty, 100, engine="compiled")
    with pytest.raises(ValueError, match=r"patience = -0\.1: must be"):
        lab.DStack(patience=-0.1)
    assert caught.value.trace.provenance.marks == (compiled.LEFT_TO_PYTHON,)


@needs_numba
def test_a_run_is_over_after_a_stall_of_ten_slos_in_both_engines():
    late = plan(("a", 50, Given((1.0, 5000.0)), 50.0, 4, table()))
    for policy in (lab.Temporal(), lab.Temporal(drop_late=True), lab.DStack(), lab.DStack(planned=False)):
        assert assert_same(late, policy, 100).requests["outcome"].tolist() == ["served", "unserved"]


@needs_numba
def test_machine_code_without_a_folder_to_keep_it_in(monkeypatch):
    import numba

    from dstack_lab.compiled.jit import jit

    def nowhere(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return function

    monkeypatch.setattr(numba, "njit", nowhere)
    assert jit(abs) is abs


def test_short_runs_and_the_import_leave_numba_alone():
    code = """
import sys, dstack_lab as lab
services = [lab.Service("resnet50", 50, lab.Poisson(100))]
plan = lab.optimize(services, lab.load_profile("v100-simulated"))
lab.simulate(plan, lab.DStack(), 1000), lab.simulate(plan, lab.Temporal(), 1000)
print(any(name.split(".")[0] in ("numba", "llvmlite") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

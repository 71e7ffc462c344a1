"""The compiled engine against the Python engine, bit for bit, and when it is chosen."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import dstack_lab as lab
from dstack_lab import compiled, simulator
from dstack_lab.policies import Policy

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
def test_a_log_that_outgrows_its_room():
    """One request a batch: six times as many launches as rows at first."""
    one = plan(("a", 2.0, lab.Poisson(300), 100.0, 1, table(1, 0.2, 50, batch_max=1)))
    trace = assert_same(one, lab.Temporal(drop_late=True), 60_000, seed=3)
    assert len(trace.launches) > 10_000
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
    assert_same(plan, lab.DStack(planned, opportunistic, fair, patience, reject), 400, seed)

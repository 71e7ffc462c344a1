"""D-STACK that follows arrivals: quiet while rates hold, quick when they change, never ahead of its mechanism."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.policies import AdaptiveDStack, slot_plan
from dstack_lab.policies.windows import EPSILON, plan_period

SHARES = tuple(5.0 * k for k in range(1, 21))
STEP_MS = 4000


def stepping():
    """A plan for 150 and 150 requests/s; at 4 s the first triples and the second all but stops."""
    points = [(name, 80, lab.Poisson(150), 50.0, 8, table(4, 1.6, 80)) for name in ("rises", "falls")]
    made = plan(*points, shares=SHARES)
    steps = (lab.Steps(((0, 150), (STEP_MS, 450))), lab.Steps(((0, 150), (STEP_MS, 5))))
    return replace(made, services=tuple(replace(s, arrivals=a) for s, a in zip(made.services, steps, strict=True)))


def attainment(trace, service, since_ms):
    rows = trace.requests[(trace.requests["service"] == service) & (trace.requests["arrival_ms"] >= since_ms)]
    return float((rows["finish_ms"] - rows["arrival_ms"] <= 80).mean())


@pytest.mark.parametrize("seed", range(5))
def test_constant_rates_are_left_alone(seed):
    steady = plan(*[(n, 80, lab.Poisson(r), 50.0, 8, table(4, 1, 50)) for n, r in (("a", 150), ("b", 60))], shares=SHARES)
    policy = AdaptiveDStack()
    lab.simulate(steady, policy, 15_000, seed=seed)
    assert policy.replanned_ms == []


def test_a_step_is_followed_within_a_second():
    moved = stepping()
    policy = AdaptiveDStack(pool=False)
    followed = lab.simulate(moved, policy, 12_000, seed=1)
    assert STEP_MS < policy.replanned_ms[0] < STEP_MS + 1000
    assert 380 < policy.rates["rises"] < 520
    assert policy.rates["falls"] < 20
    assert attainment(followed, "rises", STEP_MS + 1000) > 0.97
    fixed = lab.simulate(moved, lab.DStack(reject=True, pool=False), 12_000, seed=1)
    assert attainment(followed, "rises", STEP_MS) > attainment(fixed, "rises", STEP_MS) + 0.02


@pytest.mark.parametrize("switch_ms", [1500, 1500.00000045, 1000 / 3])
def test_new_shares_wait_for_their_standby(switch_ms):
    """Until the nanosecond that their instant rounds to: clocks count whole ones."""
    moved = stepping()
    policy = AdaptiveDStack(switch_ms=switch_ms, pool=False)
    trace = lab.simulate(moved, policy, 9000, seed=1)
    known = {s for shares in lab.DStack(reject=True, pool=False).shares(moved).values() for s in shares}
    ready_ms = policy.replanned_ms[0] + switch_ms - EPSILON
    before = trace.launches[trace.launches["start_ms"] < ready_ms]
    after = trace.launches[trace.launches["start_ms"] >= ready_ms]
    assert set(before["gpu_pct"]) <= known
    assert not set(after["gpu_pct"]) <= known


def test_a_service_that_joins_does_not_make_others_late():
    points = [(name, 80, lab.Poisson(120), 50.0, 8, table(4, 1, 40)) for name in ("old", "older")]
    joining = ("new", 60, lab.Steps(((0, 0), (3000, 120))), 50.0, 8, table(4, 1, 40))
    trace = lab.simulate(plan(*points, joining, shares=SHARES), AdaptiveDStack(), 8000, seed=2)
    late = trace.requests[trace.requests["service"] != "new"]
    assert ((late["finish_ms"] - late["arrival_ms"]) <= 80).all()


def test_a_drift_is_followed_and_those_who_leave_are_forgotten():
    """One service grows from 100 to 400/s in 10 s while the other fades out at 5 s and is gone."""
    points = [(name, 80, lab.Poisson(150), 50.0, 8, table(4, 1.6, 80)) for name in ("grows", "leaves")]
    made = plan(*points, shares=SHARES)
    moves = (lab.Drift(((0, 100), (10_000, 400))), lab.Drift(((0, 150), (5000, 0))))
    drifting = replace(made, services=tuple(replace(s, arrivals=a) for s, a in zip(made.services, moves, strict=True)))
    policy = AdaptiveDStack()
    followed = lab.simulate(drifting, policy, 14_000, seed=1)
    assert len(policy.replanned_ms) >= 2
    assert 340 < policy.rates["grows"] < 460
    assert policy.rates["leaves"] < 20
    assert attainment(followed, "grows", 0) > 0.98
    assert attainment(followed, "leaves", 0) > 0.98


def test_windows_that_take_turns_still_do_after_a_change():
    moved, policy = stepping(), AdaptiveDStack(learns=False, beside=False)
    lab.simulate(moved, policy, 6500, seed=1)
    assert policy.replanned_ms
    now = replace(moved, allocations=tuple(replace(a, rate_rps=policy.rates[a.service]) for a in moved.allocations))
    in_turns, in_lanes = (plan_period(now, True, beside).windows for beside in (False, True))
    assert policy.calendar.windows == in_turns != in_lanes


STEPS = st.lists(st.sampled_from([0, 5, 50, 300, 900]), min_size=1, max_size=4).filter(any)
SERVICES = st.lists(st.tuples(st.sampled_from([5, 20, 100 / 3, 400]), STEPS, st.integers(1, 4)), min_size=1, max_size=4)
COSTS = st.sampled_from([None, lab.Contention(slowdown=0.02), lab.Contention(slowdown=0.3)])


@settings(max_examples=60, deadline=None)
@given(
    asked=SERVICES,
    shares=st.sampled_from([SHARES, (25.0, 50.0, 100.0), (100.0,), tuple(100 / 16.5 * k for k in range(1, 17))]),
    told=COSTS,
    true=COSTS,
    switch_ms=st.sampled_from([0.0, 100.1, 100 / 3]),
    options=st.fixed_dictionaries({}, optional={"reject": st.booleans(), "beside": st.booleans(), "pool": st.booleans()}),
    seed=st.integers(0, 99),
)
def test_whatever_comes_all_are_answered_and_shares_fit(asked, shares, told, true, switch_ms, options, seed):
    """Slots and windows take over from each other as rates step, and as launches prove to cost each other."""
    points = []
    for i, (slo_ms, rates, batch) in enumerate(asked):
        steps = lab.Steps(tuple((170 * k, rate) for k, rate in enumerate(rates)))
        points.append((f"s{i}", slo_ms, steps, shares[len(shares) // 3], batch, table(0.5, 0.2, 40, batch_max=4)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slot_plan, "IN_ALL", 600)  # plans are made from draws about as long as the run
            policy = AdaptiveDStack(memory=3, switch_ms=switch_ms, **options)
            trace = lab.simulate(replace(plan(*points, shares=shares), contention=told), policy, 700, seed, contention=true)
    except lab.InfeasiblePlan:
        return  # said before the run, and only then
    assert trace.requests["outcome"].isin(["served", "dropped"]).all()
    edges = [(end, -share) for end, share in zip(trace.launches["end_ms"], trace.launches["gpu_pct"], strict=True)]
    edges += [(begin, share) for begin, share in zip(trace.launches["start_ms"], trace.launches["gpu_pct"], strict=True)]
    held = most = 0.0
    for _, change in sorted(edges):  # ends before begins
        held += change
        most = max(most, held)
    assert most <= 100 + 1e-6


def test_any_share_may_be_asked_for_and_bad_arguments_are_named():
    assert AdaptiveDStack().shares(stepping()) == {"rises": SHARES, "falls": SHARES}
    with pytest.raises(ValueError, match="memory = 1"):
        AdaptiveDStack(memory=1)
    with pytest.raises(ValueError, match="switch_ms = -1"):
        AdaptiveDStack(switch_ms=-1)
    assert plan_period(stepping()).period_ms == 80

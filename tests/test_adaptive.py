"""D-STACK that follows arrivals: quiet while rates hold, quick when they change, never ahead of its mechanism."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import plan, table

import dstack_lab as lab
from dstack_lab.policies import AdaptiveDStack
from dstack_lab.policies.windows import plan_period

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
    policy = AdaptiveDStack()
    followed = lab.simulate(moved, policy, 12_000, seed=1)
    assert STEP_MS < policy.replanned_ms[0] < STEP_MS + 1000
    assert 380 < policy.rates["rises"] < 520
    assert policy.rates["falls"] < 20
    assert attainment(followed, "rises", STEP_MS + 1000) > 0.97
    fixed = lab.simulate(moved, lab.DStack(reject=True), 12_000, seed=1)
    assert attainment(followed, "rises", STEP_MS) > attainment(fixed, "rises", STEP_MS) + 0.02


def test_new_shares_wait_for_their_standby():
    moved = stepping()
    policy = AdaptiveDStack(switch_ms=1500)
    trace = lab.simulate(moved, policy, 9000, seed=1)
    known = {s for shares in lab.DStack(reject=True).shares(moved).values() for s in shares}
    ready_ms = policy.replanned_ms[0] + 1500
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


def test_any_share_may_be_asked_for_and_bad_arguments_are_named():
    assert AdaptiveDStack().shares(stepping()) == {"rises": SHARES, "falls": SHARES}
    with pytest.raises(ValueError, match="memory = 1"):
        AdaptiveDStack(memory=1)
    with pytest.raises(ValueError, match="switch_ms = -1"):
        AdaptiveDStack(switch_ms=-1)
    assert plan_period(stepping()).period_ms == 80

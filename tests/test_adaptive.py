"""D-STACK that follows arrivals: quiet while rates hold, quick when they change, never ahead of its mechanism."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.policies import AdaptiveDStack, adaptive, slot_plan
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


class Watched(AdaptiveDStack):
    """Remembers when it asked for plans, and for which rates."""

    def reset(self, plan):
        super().reset(plan)
        self.requests: list[tuple[float, dict[str, float]]] = []

    def _plan_anew(self, state, rates, counts):
        super()._plan_anew(state, rates, counts)
        self.requests.append((state.now_ms, rates))


@pytest.mark.parametrize("plans_in_ms", [700, 1000 / 3])
def test_the_old_plan_goes_on_while_a_new_one_is_made(plans_in_ms):
    moved, policy = stepping(), Watched(plans_in_ms=plans_in_ms, pool=False)
    trace = lab.simulate(moved, policy, 9000, seed=1)
    asked_ms, _ = policy.requests[0]
    assert policy.replanned_ms[0] == pytest.approx(asked_ms + plans_in_ms, abs=1e-5)
    known = {s for shares in lab.DStack(reject=True, pool=False).shares(moved).values() for s in shares}
    starts, shares = trace.launches["start_ms"], trace.launches["gpu_pct"]
    meanwhile = shares[(starts >= asked_ms) & (starts < policy.replanned_ms[0] - EPSILON)]
    assert len(meanwhile) > 10
    assert set(meanwhile) <= known
    assert not set(shares[starts >= policy.replanned_ms[0] - EPSILON]) <= known


@pytest.mark.parametrize("rate", [5, 900], ids=["leaves", "grows"])
def test_a_plan_that_is_overtaken_is_thrown_away(rate):
    """When the first one triples a plan is asked for; before it is there the second one, of which it knows nothing, moves."""
    made = stepping()
    steps = (lab.Steps(((0, 150), (STEP_MS, 450))), lab.Steps(((0, 150), (STEP_MS + 300, rate))))
    moved = replace(made, services=tuple(replace(s, arrivals=a) for s, a in zip(made.services, steps, strict=True)))
    policy = Watched(plans_in_ms=1000)
    lab.simulate(moved, policy, 9000, seed=1)
    (first_ms, first), (second_ms, second) = policy.requests[:2]
    assert first_ms < STEP_MS + 300
    assert 100 < first["falls"] < 200
    assert first_ms + 1000 <= second_ms <= first_ms + 1000 + policy.period_ms + EPSILON  # at the next period's end
    assert abs(second["falls"] - rate) < max(20, 0.25 * rate)
    assert policy.replanned_ms[0] >= second_ms + 1000 - EPSILON


def test_a_plan_that_is_nearer_to_what_comes_than_the_old_one_takes_over():
    """A rate that goes on growing leaves every plan behind; none would ever be good enough."""
    points = [(name, 80, lab.Poisson(100), 50.0, 8, table(2, 0.5, 80)) for name in ("grows", "stays")]
    made = plan(*points, shares=SHARES)
    growing = replace(made.services[0], arrivals=lab.Drift(((0, 50), (12_000, 1200))))
    policy = Watched(plans_in_ms=400)
    lab.simulate(replace(made, services=(growing, made.services[1])), policy, 12_000, seed=2)
    assert len(policy.replanned_ms) > len(policy.requests) / 2 > 3


@pytest.mark.parametrize("error", [KeyError("oops"), lab.InfeasiblePlan("nothing fits")], ids=repr)
def test_what_goes_wrong_while_planning_is_told_unless_nothing_fits(error, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(adaptive, "cut_slots", fails)
    policy = Watched()
    if isinstance(error, KeyError):
        with pytest.raises(lab.PolicyError, match=r"Watched raised at 4\d\d\d\.\d* ms: KeyError\('oops'\)"):
            lab.simulate(stepping(), policy, 9000, seed=1)
    else:
        lab.simulate(stepping(), policy, 9000, seed=1)
        assert len(policy.requests) > 1
    assert policy.replanned_ms == []


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
    plans_in_ms=st.sampled_from([0.0, 70.1, 400.0]),
    options=st.fixed_dictionaries({}, optional={"reject": st.booleans(), "beside": st.booleans(), "pool": st.booleans()}),
    seed=st.integers(0, 99),
)
def test_whatever_comes_all_are_answered_and_shares_fit(asked, shares, told, true, switch_ms, plans_in_ms, options, seed):
    """Slots and windows take over from each other as rates step, and as launches prove to cost each other."""
    points = []
    for i, (slo_ms, rates, batch) in enumerate(asked):
        steps = lab.Steps(tuple((170 * k, rate) for k, rate in enumerate(rates)))
        points.append((f"s{i}", slo_ms, steps, shares[len(shares) // 3], batch, table(0.5, 0.2, 40, batch_max=4)))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slot_plan, "IN_ALL", 600)  # plans are made from draws about as long as the run
            policy = AdaptiveDStack(memory=3, switch_ms=switch_ms, plans_in_ms=plans_in_ms, **options)
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
    with pytest.raises(ValueError, match="plans_in_ms = -1"):
        AdaptiveDStack(plans_in_ms=-1)
    assert plan_period(stepping()).period_ms == 80

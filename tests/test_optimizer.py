"""The optimizer against brute force, and the bound against every schedule we can run."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED, profile, table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import dstack_lab as lab
from dstack_lab.constraints import BINDINGS
from dstack_lab.optimizer import _Choice, _fit_together, feasible, scores, service_tables

PROFILE = profile(light=(1.0, 0.2, 30), heavy=(4.0, 2.0, 70), wide=(2.0, 1.0, 95))


def brute_force(service, times, shares, objective):
    """Best feasible (score, share, batch), point by point from the definitions."""
    best = None
    for batch, share in itertools.product(range(1, times.batch_max + 1), shares):
        ms = times.at(batch, share)
        fill = (batch - 1) * 1000 / service.rate_rps
        if max(fill, ms) + ms <= service.slo_ms and service.rate_rps * ms <= 1000 * batch:
            score = batch / (ms * ms * share) if objective == "efficacy" else batch / (ms * share)
            if best is None or score > best[0] * (1 + 1e-12):
                best = (score, share, batch)
    return best


@settings(max_examples=40, deadline=None)
@given(
    objective=st.sampled_from(["efficacy", "capacity"]),
    slo=st.floats(5, 300),
    rate=st.floats(0.5, 400),
    model=st.sampled_from(["light", "heavy", "wide"]),
)
def test_one_service_gets_the_best_point(objective, slo, rate, model):
    service = lab.Service(model, slo, lab.Poisson(rate))
    shares = [float(g) for g in range(10, 101, 10)]
    (times,) = service_tables([service], PROFILE)
    best = brute_force(service, times, shares, objective)
    if best is None:
        with pytest.raises(lab.InfeasiblePlan, match=model):
            lab.optimize([service], PROFILE, objective)
        return
    plan = lab.optimize([service], PROFILE, objective)
    found = plan[model]
    assert found.binding in BINDINGS
    ms = times.at(found.batch, found.gpu_pct)
    if rate * best[1] * times.at(best[2], best[1]) / best[2] <= 100_000:  # else it moved to a cheaper point
        assert found.batch / (found.gpu_pct * ms ** (2 if objective == "efficacy" else 1)) == pytest.approx(best[0])
    assert max((found.batch - 1) * 1000 / rate, ms) + ms <= slo
    assert found.service_ms == ms


def test_scores_and_feasibility_follow_their_definitions():
    times, shares = table(batch_max=5), (10.0, 40.0, 100.0)
    for objective, power in (("efficacy", 2), ("capacity", 1)):
        score = scores(times, shares, objective)
        for b, g in itertools.product(range(1, 6), range(3)):
            assert score[b - 1, g] == pytest.approx(b / (times.at(b, shares[g]) ** power * shares[g]))
    assert not feasible(times, shares, slo_ms=2.9, rate_rps=1).any()  # 2 · L(1, 100) = 3
    assert feasible(times, shares, slo_ms=3.0, rate_rps=1).tolist()[0] == [False, True, True]
    assert not feasible(times, shares, slo_ms=3.0, rate_rps=1)[1:].any()  # a second request comes a second later


def test_services_that_ask_for_too_much_move_to_cheaper_points():
    """Alone each takes its best point; together these ask for more than the GPU, so some move."""
    services = [lab.Service(m, 60, lab.Poisson(r)) for m, r in (("light", 1100), ("heavy", 160), ("wide", 250))]
    alone = sum(lab.optimize([s], PROFILE).demand_pct for s in services)
    together = lab.optimize(services, PROFILE)
    assert alone > 100
    assert together.demand_pct <= 100
    moved = [a != lab.optimize([s], PROFILE).allocations[0] for s, a in zip(services, together.allocations, strict=True)]
    assert any(moved)
    assert [a.binding == "GPU total" for a in together.allocations] == moved


ladders = st.lists(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(1, 60)), min_size=1, max_size=5).map(
        # falling scores, falling loads
        lambda steps: [
            _Choice(score, load, 1, 0)
            for score, load in zip(
                sorted({s for s, _ in steps}, reverse=True), sorted({x for _, x in steps}, reverse=True), strict=False
            )
        ]
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(choices=ladders)
def test_the_service_that_loses_least_moves_first(choices):
    """As told in words: while they ask for more than 100, find the cheapest step anew and take it."""
    at = [0] * len(choices)
    while sum(c[i].load_pct for c, i in zip(choices, at, strict=True)) > 100:
        steps = [
            ((1 - c[i + 1].score / c[i].score) / (c[i].load_pct - c[i + 1].load_pct), k)
            for k, (c, i) in enumerate(zip(choices, at, strict=True))
            if i + 1 < len(c)
        ]
        if not steps:
            break
        at[min(steps)[1]] += 1
    assert _fit_together(choices) == [c[i] for c, i in zip(choices, at, strict=True)]


def test_a_plan_says_what_binds_in_its_table():
    services = [lab.Service("heavy", 60, lab.Poisson(400)), lab.Service("light", 10, lab.Poisson(100))]
    plan = lab.optimize(services, PROFILE, "capacity")
    assert plan.to_frame()["binding"].tolist() == [a.binding for a in plan.allocations] == ["SLO: wait", "SLO: fill"]
    by_hand = lab.Plan(
        plan.services,
        tuple(lab.Allocation(a.service, a.gpu_pct, a.batch, a.service_ms, a.rate_rps) for a in plan.allocations),
        plan.tables,
        plan.shares,
        "mine",
        plan.provenance,
    )
    assert by_hand.to_frame()["binding"].isna().all()
    with pytest.raises(ValueError, match=r"plan\.objective = 'mine': must be one of"):
        lab.sensitivity(by_hand)
    with pytest.raises(ValueError, match=r"^plan = None: must be a Plan of lab\.optimize$"):
        lab.sensitivity(None)


@pytest.mark.parametrize("share", [0.5, 100.5, -25, float("nan"), "25"])
def test_a_plan_by_hand_holds_shares_of_the_gpu(share):
    plan = lab.optimize([lab.Service("heavy", 60, lab.Poisson(100))], PROFILE)
    with pytest.raises(ValueError, match=f"^shares = {share!r}: must be a GPU% from 1 to 100$"):
        replace(plan, shares=(share, *plan.shares))
    with pytest.raises(ValueError, match=r"^shares = \(100\.0, 50\.0\): must be ascending GPU%$"):
        replace(plan, shares=(100.0, 50.0))


@settings(max_examples=40, deadline=None)
@given(
    objective=st.sampled_from(["efficacy", "capacity"]),
    slos=st.lists(st.floats(20, 300), min_size=3, max_size=3),
    rates=st.lists(st.floats(1, 300), min_size=1, max_size=3),
)
def test_sensitivity_is_the_plan_with_one_step_taken(objective, slos, rates):
    """Each row against the objective, the constraints and the demand of the plan with that one allocation replaced."""
    services = [lab.Service(m, s, lab.Poisson(r)) for m, s, r in zip(("light", "heavy", "wide"), slos, rates, strict=False)]
    try:
        plan = lab.optimize(services, PROFILE, objective)
    except lab.InfeasiblePlan:
        return
    rows = lab.sensitivity(plan)
    expected = 0
    for k, (service, now, times) in enumerate(zip(services, plan.allocations, plan.tables, strict=True)):
        at = plan.shares.index(now.gpu_pct)
        for step, batch, column in (
            ("share down", now.batch, at - 1),
            ("share up", now.batch, at + 1),
            ("batch down", now.batch - 1, at),
            ("batch up", now.batch + 1, at),
        ):
            row = rows[(rows["service"] == service.name) & (rows["step"] == step)]
            if not (1 <= batch <= times.batch_max and 0 <= column < len(plan.shares)):
                assert row.empty
                continue
            expected += 1
            (row,) = row.itertuples()
            share = plan.shares[column]
            there = lab.Allocation(service.name, share, batch, times.at(batch, share), now.rate_rps)
            others = [there if i == k else a for i, a in enumerate(plan.allocations)]
            after = lab.Plan(plan.services, tuple(others), plan.tables, plan.shares, objective, plan.provenance)
            value = scores(times, plan.shares, objective)
            assert (row.gpu_pct, row.batch, row.service_ms) == (share, batch, there.service_ms)
            assert row.score_lost == pytest.approx(1 - value[batch - 1, column] / value[now.batch - 1, at], abs=1e-9)
            assert row.service_added_ms == pytest.approx(there.service_ms - now.service_ms)
            assert row.demand_pct == pytest.approx(now.rate_rps * there.area_pct_ms / 1000)
            assert row.demand_added_pct == pytest.approx(after.demand_pct - plan.demand_pct, abs=1e-9)
            keeps = feasible(times, plan.shares, service.slo_ms, now.rate_rps)[batch - 1, column]
            assert row.feasible == (keeps and after.demand_pct <= 100 + 1e-6)
            assert (row.binding == "none") == row.feasible
            if row.score_lost < -1e-9:
                assert not row.feasible or now.binding == "GPU total"  # else the search would have gone there
    assert len(rows) == expected


def test_a_step_that_only_the_whole_gpu_forbids():
    services = [lab.Service(m, 60, lab.Poisson(r)) for m, r in (("light", 1100), ("heavy", 160), ("wide", 250))]
    plan = lab.optimize(services, PROFILE)
    rows = lab.sensitivity(plan)
    full = rows[rows["binding"] == "GPU total"]
    assert len(full) > 0
    assert (full["demand_added_pct"] > 100 - plan.demand_pct).all()
    assert not full["feasible"].any()


def test_a_plan_for_a_device_uses_what_it_grants():
    service = lab.Service("heavy", 100, lab.Poisson(20))
    half = SimpleNamespace(shares=lambda: [100, 50.0, 50])
    plan = lab.optimize([service], PROFILE, device=half)
    assert plan.shares == (50.0, 100.0)
    assert plan["heavy"].gpu_pct in plan.shares
    assert lab.optimize([service], PROFILE, shares=[50], device=half).shares == (50.0,)
    thirds = SimpleNamespace(shares=lambda: (33.33, 66.67, 100.0))
    found = lab.optimize([service], PROFILE, device=thirds)
    best = brute_force(service, found.tables[0], thirds.shares(), "efficacy")
    assert (found["heavy"].gpu_pct, found["heavy"].batch) == best[1:]
    assert found["heavy"].service_ms == found.tables[0].at(best[2], best[1])


def test_overload_is_refused_with_who_asks_for_what_or_planned_for_its_admitted_part():
    services = [lab.Service("light", 60, lab.Poisson(2000)), lab.Service("heavy", 100, lab.Poisson(900))]
    with pytest.raises(lab.InfeasiblePlan, match=r"light 2000/s at .* GPU%·ms = \d+ %, heavy 900/s"):
        lab.optimize(services, PROFILE)
    plan = lab.optimize(services, PROFILE, overload="reject")
    areas = lab.bound(services, PROFILE).area_pct_ms
    part = 100_000 / sum(s.rate_rps * a for s, a in zip(services, areas, strict=True))
    for service, allocation in zip(services, plan.allocations, strict=True):
        assert allocation.rate_rps <= part * service.rate_rps * (1 + 1e-9)
        assert allocation.rate_rps >= part * service.rate_rps / 10  # nobody is starved
    assert plan.demand_pct <= 101


def test_a_rate_that_one_launch_after_another_cannot_answer_names_the_most_it_can():
    def plan(rate_rps):
        return lab.optimize([lab.Service("light", 30, lab.Poisson(rate_rps))], PROFILE)

    with pytest.raises(lab.InfeasiblePlan, match=r"light asks for .*/s within slo_ms = 30, .* at most") as said:
        plan(0.999 * lab.bound([lab.Service("light", 30, lab.Poisson(1e5))], PROFILE).total_rps)
    most = float(re.search(r"answers ([\d.]+)/s", str(said.value))[1])
    assert plan(most - 0.1).allocations[0].rate_rps == most - 0.1
    with pytest.raises(lab.InfeasiblePlan):
        plan(most + 0.1)


def test_an_slo_nobody_can_meet_names_the_service_and_its_fastest_time():
    with pytest.raises(lab.InfeasiblePlan, match=r"heavy asks for slo_ms = 7 .* 2 x 6\.\d+ ms at 100 GPU%"):
        lab.optimize([lab.Service("heavy", 7, lab.Poisson(10))], PROFILE)
    with pytest.raises(lab.InfeasiblePlan, match=r"heavy asks for slo_ms = 5 "):
        lab.bound([lab.Service("heavy", 5, lab.Poisson(10))], PROFILE)


@settings(max_examples=40, deadline=None)
@given(rates=st.lists(st.floats(1, 3000), min_size=2, max_size=3), slos=st.lists(st.floats(20, 300), min_size=3, max_size=3))
def test_the_bound_is_the_optimum_of_its_linear_program(rates, slos):
    services = [lab.Service(m, s, lab.Poisson(r)) for m, s, r in zip(("light", "heavy", "wide"), slos, rates, strict=False)]
    limit = lab.bound(services, PROFILE)
    areas = np.array(limit.area_pct_ms)
    # A greedy fill in the order of area is optimal for one constraint: a second, independent solution.
    left, total = 100_000.0, 0.0
    for i in np.argsort(areas):
        take = min(rates[i], left / areas[i])
        left, total = left - take * areas[i], total + take
    assert limit.total_rps == pytest.approx(total)
    assert linprog([-1.0] * len(rates), A_ub=[areas], b_ub=[100_000], bounds=[(0, r) for r in rates]).fun == pytest.approx(-total)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), load=st.floats(0.5, 2.0), which=st.integers(0, 2))
def test_no_policy_beats_the_bound(seed, load, which):
    services = [lab.Service("light", 40, lab.Poisson(1200 * load)), lab.Service("heavy", 80, lab.Poisson(90 * load))]
    plan = lab.optimize(services, PROFILE, "capacity", overload="reject")
    policy = (lab.Temporal(drop_late=True), lab.DStack(reject=True), lab.DStack(reject=True, planned=False))[which]
    duration = 4000
    trace = lab.simulate(plan, policy, duration, seed)
    requests = trace.requests.merge(trace.services, on="service")
    in_time = requests["finish_ms"] - requests["arrival_ms"] <= requests["slo_ms"] + 1e-9
    area = dict(zip(plan.tables and [s.name for s in services], lab.bound(services, PROFILE).area_pct_ms, strict=True))
    spent = sum(area[name] * n for name, n in requests[in_time].groupby("service").size().items())
    assert spent <= 100 * float(trace.launches["end_ms"].max()) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"services": []}, "services"),
        ({"services": [1]}, "services"),
        ({"objective": "best"}, "objective = 'best'"),
        ({"overload": "hope"}, "overload = 'hope'"),
        ({"shares": [0]}, "shares = 0"),
        ({"shares": []}, r"shares = \(\): must be 1 or more GPU% from 1 to 100"),
        ({"shares": [101]}, "shares = 101: must be a GPU% from 1 to 100"),
        ({"shares": [float("nan")]}, "shares = nan: must be a GPU% from 1 to 100"),
        ({"shares": [40], "device": SimpleNamespace(shares=lambda: (50, 100))}, r"shares = 40\.0: must be granted by the device"),
        ({"device": object()}, r"device = .*: must be a device: an object whose shares\(\)"),
        ({"services": [lab.Service("gpt", 50, lab.Poisson(1))]}, "model of gpt = 'gpt': must be one of heavy, light, wide"),
        ({"services": [lab.Service("light", 50, lab.Poisson(1))] * 2}, "distinct"),
    ],
)
def test_bad_input_is_named(arguments, message):
    good = {"services": [lab.Service("light", 50, lab.Poisson(1))], "profile": PROFILE}
    with pytest.raises(ValueError, match=message):
        lab.optimize(**{**good, **arguments})


def test_what_cannot_even_be_asked():
    """Each is refused where it is made, before any plan."""
    with pytest.raises(ValueError, match="rate_rps = 0: must be a finite number above 0"):
        lab.Poisson(0)
    with pytest.raises(ValueError, match="slo_ms = inf: must be a finite number above 0"):
        lab.Service("light", float("inf"), lab.Poisson(1))
    columns = ["model", "batch", "gpu_pct", "service_ms"]
    with pytest.raises(ValueError, match="table rows = 0: must be 1 or more"):
        lab.Profile(pd.DataFrame([], columns=columns), SIMULATED)
    alone = lab.Profile(pd.DataFrame([("light", 1, 100, 5.0)], columns=columns), SIMULATED)
    with pytest.raises(ValueError, match="points of light = 1: must be 2 or more"):
        lab.optimize([lab.Service("light", 50, lab.Poisson(1))], alone)


def test_a_noisy_profile_still_gives_a_monotone_plan_table():
    rng = np.random.default_rng(0)
    rows = PROFILE.table.assign(service_ms=PROFILE.table["service_ms"] * rng.lognormal(0, 0.2, len(PROFILE.table)))
    noisy = lab.Profile(pd.DataFrame(rows), SIMULATED, strict=False)
    plan = lab.optimize([lab.Service("heavy", 100, lab.Poisson(20))], noisy)
    ms = plan.tables[0].ms
    assert (np.diff(ms, axis=0) >= -1e-9).all()
    assert (np.diff(ms, axis=1) <= 1e-9).all()

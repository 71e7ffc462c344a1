"""The optimizer against brute force, and the bound against every schedule we can run."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED, profile, table
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import dstack_lab as lab
from dstack_lab.optimizer import feasible, scores, service_tables

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


def test_overload_is_refused_with_who_asks_for_what_or_planned_for_its_admitted_part():
    services = [lab.Service("light", 60, lab.Poisson(2000)), lab.Service("heavy", 100, lab.Poisson(900))]
    with pytest.raises(lab.InfeasiblePlan, match=r"light 2000/s at .* GPU%·ms = \d+ %, heavy 900/s"):
        lab.optimize(services, PROFILE)
    plan = lab.optimize(services, PROFILE, overload="reject")
    admitted = lab.bound(services, PROFILE).rates_rps
    for allocation in plan.allocations:
        assert 0 < allocation.rate_rps <= admitted[allocation.service] * (1 + 1e-9)
    assert plan.demand_pct <= 101


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
        ({"services": [lab.Service("gpt", 50, lab.Poisson(1))]}, "model of gpt = 'gpt': must be one of heavy, light, wide"),
        ({"services": [lab.Service("light", 50, lab.Poisson(1))] * 2}, "distinct"),
    ],
)
def test_bad_input_is_named(arguments, message):
    good = {"services": [lab.Service("light", 50, lab.Poisson(1))], "profile": PROFILE}
    with pytest.raises(ValueError, match=message):
        lab.optimize(**{**good, **arguments})


def test_a_noisy_profile_still_gives_a_monotone_plan_table():
    rng = np.random.default_rng(0)
    rows = PROFILE.table.assign(service_ms=PROFILE.table["service_ms"] * rng.lognormal(0, 0.2, len(PROFILE.table)))
    noisy = lab.Profile(pd.DataFrame(rows), SIMULATED, strict=False)
    plan = lab.optimize([lab.Service("heavy", 100, lab.Poisson(20))], noisy)
    ms = plan.tables[0].ms
    assert (np.diff(ms, axis=0) >= -1e-9).all()
    assert (np.diff(ms, axis=1) <= 1e-9).all()

"""A recorded run's requests through the simulator: a simulated run is its own oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from builders import profile

import dstack_lab as lab

TOY = profile(small=(1.0, 0.5, 40.0), large=(2.0, 1.0, 80.0))
SERVICES = (lab.Service("small", 25, lab.Gamma(300, 2), "s"), lab.Service("large", 50, lab.Poisson(100)))
ERRORS = ["goodput_rps_error", "p99_ms_error", "slo_attainment_error", "utilization_error"]


@pytest.fixture(scope="module")
def plan():
    return lab.optimize(SERVICES, TOY)


def slower(factor):
    return lab.Profile(TOY.table.assign(service_ms=TOY.table["service_ms"] * factor), TOY.provenance)


@pytest.mark.parametrize("policy", [lab.DStack(), lab.Temporal()], ids=lambda p: p.name)
def test_a_simulated_run_is_simulated_without_error(plan, policy):
    trace = lab.simulate(plan, policy, 2000, seed=5)
    for arguments in ({}, {"policy": policy, "plan": plan}):
        table = lab.validate(trace, TOY, **arguments)
        assert table["service"].tolist() == ["s", "large", "all"]
        assert (table[ERRORS] == 0).all(axis=None)
        pd.testing.assert_series_equal(table["goodput_rps_simulated"], lab.summary(trace)["goodput_rps"], check_names=False)


def test_a_loaded_trace_too(plan, tmp_path):
    trace = lab.load_trace(lab.simulate(plan, lab.DStack(), 1000, seed=5).save(tmp_path / "run"))
    assert (lab.validate(trace, TOY)[ERRORS] == 0).all(axis=None)


def test_drawn_service_times_come_from_the_same_seed(plan):
    trace = lab.simulate(plan, lab.Temporal(), 2000, seed=5, variability=lab.Lognormal(0.3))
    assert (lab.validate(trace, TOY, variability=lab.Lognormal(0.3))[ERRORS] == 0).all(axis=None)
    assert (lab.validate(trace, TOY)[ERRORS] != 0).any(axis=None)


def test_the_run_own_policy_and_plan_matter(plan):
    wide = replace(plan, allocations=tuple(replace(a, gpu_pct=100.0, batch=2) for a in plan.allocations))
    trace = lab.simulate(wide, lab.DStack(patience=0), 2000, seed=5)
    assert (lab.validate(trace, TOY, lab.DStack(patience=0), wide)[ERRORS] == 0).all(axis=None)
    assert (lab.validate(trace, TOY)[ERRORS] != 0).any(axis=None)


@pytest.mark.parametrize(("factor", "sign"), [(0.8, -1), (1.25, 1)])
def test_a_wrong_profile_errs_to_its_side(plan, factor, sign):
    """Told that batches take longer, the simulator says later answers and a busier GPU than were recorded."""
    trace = lab.simulate(plan, lab.Temporal(), 2000, seed=5)
    table = lab.validate(trace, slower(factor), plan=plan)
    assert (np.sign(table["p99_ms_error"]) == sign).all()
    assert (np.sign(table["utilization_error"]) == sign).all()


def test_errors_are_what_they_are_called(plan):
    trace = lab.simulate(plan, lab.Temporal(), 2000, seed=5)
    table = lab.validate(trace, slower(3), plan=plan)
    recorded = lab.summary(trace)
    assert table["p99_ms"].tolist() == recorded["p99_ms"].tolist()
    for metric in ("goodput_rps", "p99_ms"):
        assert table[f"{metric}_error"].to_numpy() == pytest.approx(table[f"{metric}_simulated"] / recorded[metric] - 1)
    for metric in ("slo_attainment", "utilization"):
        assert table[f"{metric}_error"].to_numpy() == pytest.approx(table[f"{metric}_simulated"] - recorded[metric])
    assert (table["goodput_rps_error"] < 0).all()
    assert (table["slo_attainment_error"] < 0).all()
    kinds = [one.kind for one in table.attrs["provenance"]]
    assert kinds == ["simulated", "simulated"]


def test_a_service_without_requests_stays_silent(plan):
    silent = replace(plan, services=(replace(SERVICES[0], arrivals=lab.Replay([1e6])), SERVICES[1]))
    trace = lab.simulate(silent, lab.Temporal(), 1000, seed=5)
    table = lab.validate(trace, TOY, plan=plan).set_index("service")
    assert (table.loc["s", "goodput_rps_simulated"], table.loc["s", "goodput_rps_error"]) == (0, 0)
    assert np.isnan(table.loc["s", "p99_ms_error"])
    assert table.loc["large", "p99_ms_error"] == 0


def test_a_request_in_the_last_instant_is_replayed():
    services = (lab.Service("small", 25, lab.Replay([10.0, np.nextafter(1000.0, 0)])),)
    plan = lab.optimize(services, TOY)
    trace = lab.simulate(plan, lab.Temporal(), 1000)
    assert len(trace.requests) == 2
    assert (lab.validate(trace, TOY, plan=plan)[ERRORS] == 0).all(axis=None)


class Mine(lab.Temporal):
    pass


def test_bad_input(plan):
    trace = lab.simulate(plan, Mine(), 500)
    with pytest.raises(ValueError, match=r"trace.policy = 'Mine': must be the name of a policy of dstack_lab: pass policy="):
        lab.validate(trace, TOY)
    assert (lab.validate(trace, TOY, policy=Mine())[ERRORS] == 0).all(axis=None)
    with pytest.raises(ValueError, match="trace = 'Plan': must be a Trace"):
        lab.validate(plan, TOY)
    with pytest.raises(ValueError, match="model of s = 'small': must be one of"):
        lab.validate(trace, profile(large=(2.0, 1.0, 80.0)), Mine(), plan)
    other = lab.optimize(SERVICES[:1], TOY)
    with pytest.raises(ValueError, match=r"plan.services = \['s'\]"):
        lab.validate(trace, TOY, Mine(), other)
    short = lab.Profile(TOY.table[TOY.table["batch"] == 1], TOY.provenance)
    with pytest.raises(ValueError, match=r"batch of \w+ = \d+: must be at most 1, the largest in the profile"):
        lab.validate(trace, short, Mine(), plan)

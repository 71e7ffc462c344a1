"""A recorded run's requests through the simulator: a simulated run is its own oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from builders import profile

import dstack_lab as lab
from dstack_lab.digests import digest
from dstack_lab.recipes import plan_of, policy_of, recipe_of

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


@pytest.mark.parametrize("contention", [None, lab.Contention()])
@pytest.mark.parametrize("seed", range(3))
def test_lanes_are_those_of_the_run_whatever_number_of_requests_came(plan, contention, seed):
    """They are chosen for the rates that were expected: DStack plans for all that services ask for where it may reject."""
    knows, policy = replace(plan, contention=contention), lab.DStack(reject=True)
    trace = lab.simulate(knows, policy, 1000, seed)
    assert (lab.validate(trace, TOY, policy, knows)[ERRORS] == 0).all(axis=None)


def test_drawn_service_times_come_from_the_same_seed(plan):
    trace = lab.simulate(plan, lab.Temporal(), 2000, seed=5, variability=lab.Lognormal(0.3))
    assert (lab.validate(trace, TOY, variability=lab.Lognormal(0.3))[ERRORS] == 0).all(axis=None)
    assert (lab.validate(trace, TOY)[ERRORS] != 0).any(axis=None)


def test_the_run_own_policy_and_plan_matter(plan):
    wide = replace(plan, allocations=tuple(replace(a, gpu_pct=100.0, batch=2) for a in plan.allocations))
    trace = lab.simulate(wide, lab.DStack(patience=0, pool=False), 2000, seed=5)
    assert (lab.validate(trace, TOY, lab.DStack(patience=0, pool=False), wide)[ERRORS] == 0).all(axis=None)
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


# What a trace carries


def carried(plan, policy, **options):
    """A trace as `run` makes it, but simulated: its own oracle."""
    recipe = recipe_of(plan, policy)
    return replace(lab.simulate(plan, policy, 1500, seed=5, **options), recipe=recipe)


@pytest.mark.parametrize(
    "policy",
    [lab.DStack(patience=0.0), lab.DStack(fair=False), lab.Temporal(drop_late=True), lab.Gslice(), lab.Triton(max_batch=2)],
    ids=lambda p: p.name,
)
def test_a_trace_alone_is_enough(plan, policy, tmp_path):
    wide = replace(plan, allocations=tuple(replace(a, batch=2) for a in plan.allocations))
    trace = lab.load_trace(carried(wide, policy).save(tmp_path / "run"))
    assert (lab.validate(trace)[ERRORS] == 0).all(axis=None)


def test_with_another_profile_the_run_own_plan_and_policy_stay(plan):
    trace = carried(plan, lab.DStack(patience=0))
    same = lab.validate(trace, TOY)
    assert (same[ERRORS] == 0).all(axis=None)
    assert (lab.validate(trace, slower(1.25))["p99_ms_error"] > 0).all()


KINDS = [lab.AdaptiveDStack(memory=5, patience=0.5), lab.Clipper(mode="aimd", seed=3), lab.Nexus(epoch_ms=5000.0)]
KINDS += [lab.Gslice(), lab.Gpulet(drop_late=True), lab.MaxThroughput(), lab.MaxMin(True), lab.Uncontrolled("plan"), lab.Triton()]


@pytest.mark.parametrize("policy", KINDS, ids=lambda p: p.name)
def test_policies_come_back_with_their_parameters(plan, policy):
    again = policy_of(recipe_of(plan, policy))
    assert digest(again) == digest(policy)


def test_what_plain_values_cannot_tell_must_be_passed(plan):
    trace = carried(plan, Mine())
    assert trace.recipe["policy"] is None
    with pytest.raises(ValueError, match=r"trace.policy = 'Mine': .* pass policy="):
        lab.validate(trace)
    assert (lab.validate(trace, policy=Mine())[ERRORS] == 0).all(axis=None)
    with pytest.raises(ValueError, match="profile = None: must be a profile of the run's machine: this trace carries no plan"):
        lab.validate(lab.simulate(plan, lab.Temporal(), 500))


@pytest.mark.slow
def test_a_real_run_is_validated_from_its_file(tmp_path):
    """Bookkeeping is exact: the same requests, the same plan; how well times agree is printed, never asserted."""
    shares = lab.devices.Cpu().shares()
    rows = [
        {"model": "squeezenet1_1", "batch": b, "gpu_pct": g, "service_ms": 20.0 * b * shares[-1] / g}
        for b in (1, 2)
        for g in shares
    ]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "this machine", "core sets"))
    made = lab.optimize([lab.Service("squeezenet1_1", 2000, lab.Poisson(6))], profile, "capacity")
    run = lab.run(made, lab.DStack(patience=0.1), lab.devices.Cpu(), 2000, seed=3, drain_ms=30_000)
    trace = lab.load_trace(run.save(tmp_path / "run"))
    assert policy_of(trace.recipe).patience == 0.1
    table = lab.validate(trace)
    print(table.to_string(index=False))
    assert [p.kind for p in table.attrs["provenance"]] == ["measured", "simulated"]
    assert table["goodput_rps"].tolist() == lab.summary(run)["goodput_rps"].tolist()
    assert (table["slo_attainment_simulated"].between(0, 1)).all()
    again = plan_of(trace.recipe, made.services)
    assert again.allocations == made.allocations
    assert all(np.array_equal(a.ms, b.ms) for a, b in zip(again.tables, made.tables, strict=True))

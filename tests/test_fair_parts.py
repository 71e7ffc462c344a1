"""Who gives way beyond the bound: max-min fair by its definition, and small askers keep all in a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.metrics import gpu_time
from dstack_lab.policies.fair_parts import demands, fair_parts, fairly_reduced
from dstack_lab.trials import plan_for


def test_by_hand():
    assert fair_parts([10, 80, 60], 100) == pytest.approx([1, 45 / 80, 45 / 60])
    assert fair_parts([10, 20], 100) == [1, 1]
    assert fair_parts([50, 50, 50, 50], 100) == [0.5] * 4
    assert fair_parts([0, 30], 10) == pytest.approx([1, 1 / 3])
    assert fair_parts([], 10) == []
    assert fair_parts([25 + 1e-12] * 4, 100) == [1] * 4  # all of it, as far as sums tell
    assert max(fair_parts([25 + 1e-6] * 4, 100)) < 1


@given(asked=st.lists(st.floats(0, 1e4), min_size=1, max_size=8), most=st.floats(0.1, 1e4))
def test_max_min_fair(asked, most):
    """All is granted, and nobody who goes without something has less than anyone else."""
    granted = [a * p for a, p in zip(asked, fair_parts(asked, most), strict=True)]
    assert sum(granted) == pytest.approx(min(most, sum(asked)))
    short = [g for g, a in zip(granted, asked, strict=True) if g < a * (1 - 1e-9)]
    assert all(g == pytest.approx(max(granted)) for g in short)


def test_within_the_bound_a_plan_stays():
    known = lab.load_profile("v100-simulated")
    plan = lab.optimize(lab.workload("C-4", known, 0.8), known)
    assert fairly_reduced(plan) is plan


def test_equal_demands_are_cut_alike():
    known = lab.load_profile("v100-simulated")
    plan = plan_for(lab.workload("C-4", known, 1.5, "equal_time"), known, "efficacy")
    for before, after in zip(plan.allocations, fairly_reduced(plan).allocations, strict=True):
        assert after.rate_rps == pytest.approx(before.rate_rps, rel=0.1)  # `optimize` may leave some a tenth less


@pytest.mark.parametrize("name", ["C-3", "C-4"])
@pytest.mark.parametrize("load", [1.5, 3.0])
def test_who_asks_for_little_is_served(name, load):
    """Equal rates, so that vgg19 asks for most of the GPU: those below their fair part hardly lose a request."""
    known = lab.load_profile("v100-simulated")
    services = lab.workload(name, known, load, "equal_rate")
    plan = plan_for(services, known, "efficacy")
    asked = demands(plan, [s.rate_rps for s in services])
    trace = lab.simulate(plan, lab.DStack(reject=True), 3000, seed=2)
    attained = lab.summary(trace).set_index("service")["slo_attainment"]
    small = [s.name for s, pct in zip(services, asked, strict=True) if pct < 0.7 * 100 / len(services)]
    assert small
    assert all(attained[name] > 0.97 for name in small)
    received = gpu_time(trace)
    assert received.max() == received["vgg19"]  # who asks for most still gets most
    assert attained["vgg19"] > 0.1

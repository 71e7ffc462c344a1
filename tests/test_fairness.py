"""Under overload D-STACK gives backlogged services equal GPU time, and starves none: workloads C-2 to C-7, both profiles."""

from __future__ import annotations

import functools

import pytest

import dstack_lab as lab
from dstack_lab.metrics import gpu_time
from dstack_lab.trials import plan_for
from dstack_lab.workloads import WORKLOADS

#: Long enough for hundreds of launches of every service.
DURATION_MS = {"v100-simulated": 6000, "h200-simulated": 2000}
overloads = pytest.mark.parametrize(
    ("profile", "name", "load"), [(profile, name, load) for profile in DURATION_MS for name in WORKLOADS for load in (1.5, 3.0)]
)


@functools.cache
def overloaded(profile: str, name: str, load: float, arrivals: str) -> lab.Trace:
    """Run of a workload in which every service alone asks for more than its equal part of the GPU."""
    times = lab.load_profile(profile)
    services = lab.workload(name, times, load, "equal_time", arrivals)
    policy = lab.DStack(reject=True)
    return lab.simulate(plan_for(services, times, "efficacy"), policy, DURATION_MS[profile], seed=2)


@overloads
@pytest.mark.parametrize("arrivals", ["poisson", "gamma"])
def test_backlogged_services_get_equal_gpu_time(profile, name, load, arrivals):
    trace = overloaded(profile, name, load, arrivals)
    received = gpu_time(trace)
    assert (lab.summary(trace).set_index("service")["dropped"] > 0).all()  # backlogged, each of them
    assert len(received) == len(WORKLOADS[name])
    assert lab.jain(received) >= 0.95, received


@overloads
@pytest.mark.parametrize("arrivals", ["poisson", "gamma"])
def test_no_service_starves(profile, name, load, arrivals):
    """A fair schedule without loss would serve 1 / load of each in time; nobody gets less than half of that.

    Nor does anyone go without GPU time for longer than the 10 periods over which fairness is kept.
    """
    trace = overloaded(profile, name, load, arrivals)
    attained = lab.summary(trace).set_index("service")["slo_attainment"]
    assert (attained * load >= 0.5).all(), attained
    memory_ms = 10 * max(WORKLOADS[name].values())
    for service in WORKLOADS[name]:
        starts = trace.launches.loc[trace.launches["service"] == service, "start_ms"]
        assert starts.diff().max() < memory_ms, service


@pytest.mark.parametrize("profile", DURATION_MS)
def test_the_measures_tell_a_policy_that_starves(profile):
    """Greedy for requests, the cheapest networks take the GPU: both tests above would fail it."""
    times = lab.load_profile(profile)
    made = plan_for(lab.workload("C-4", times, 1.5), times, "efficacy")
    trace = lab.simulate(made, lab.MaxThroughput(drop_late=True), DURATION_MS[profile], seed=2)
    assert lab.jain(gpu_time(trace)) < 0.8
    assert lab.summary(trace)["slo_attainment"].min() < 0.1

"""The bound that knows when requests come: beside brute force, and never below what a policy reaches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import profile, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.bounds import service_tables
from dstack_lab.ceilings import ceiling, least_area

SHARES = (25.0, 50.0, 100.0)
KNOWN = table(4.0, 1.0, 60, batch_max=4)


def cheapest_schedule(times, slo, known):
    """Least GPU%·ms of any partition into batches that could all be in time, by trying all of them."""

    def partitions(items):
        if not items:
            yield []
            return
        first, rest = items[0], items[1:]
        for n in range(min(known.batch_max, len(items))):
            for others in itertools.combinations(rest, n):
                for more in partitions([r for r in rest if r not in others]):
                    yield [(first, *others), *more]

    def cost(batch):
        fits = [g * known.at(len(batch), g) for g in SHARES if known.at(len(batch), g) <= slo - (max(batch) - min(batch))]
        return min(fits, default=np.inf)

    return min(sum(map(cost, one)) for one in partitions(list(times)))


@given(times=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True), slo=st.sampled_from([9.0, 12.0, 20.0, 40.0]))
@settings(max_examples=60, deadline=None)
def test_no_schedule_is_cheaper_than_the_sum(times, slo):
    times = sorted(map(float, times))
    found = least_area(np.array(times), slo, KNOWN, SHARES)
    best = cheapest_schedule(times, slo, KNOWN)
    assert found.sum() <= best + 1e-9
    assert np.isinf(found.sum()) == np.isinf(best)


def test_by_hand():
    """Alone 5 ms at 60 % or more; 25, 50, 100 % take 12, 6, 5 ms: areas 300, 300, 500. Two together 14.4, 7.2, 6 ms."""
    one = least_area(np.array([0.0]), 12.0, KNOWN, SHARES)
    assert one == pytest.approx([300])
    assert least_area(np.array([0.0]), 4.0, KNOWN, SHARES) == pytest.approx([np.inf])
    near = least_area(np.array([0.0, 1.0, 100.0]), 12.0, KNOWN, SHARES)
    assert near == pytest.approx([180, 180, 300])  # two at 50 %: 7.2 <= 12 - 1
    far = least_area(np.array([0.0, 5.5]), 12.0, KNOWN, SHARES)
    assert far == pytest.approx([300, 300])  # only 6 ms at 100 % would fit into 6.5, and 600/2 is no less than alone


def test_requests_that_all_come_together_cost_what_the_bound_says():
    known, shares = profile(m=(4.0, 1.0, 60)), tuple(map(float, range(10, 101, 10)))
    asked = (lab.Service("m", 60, lab.Poisson(10)),)
    times = service_tables(asked, known)[0]
    least = lab.bound(asked, known).area_pct_ms[0]
    assert least_area(np.zeros(64), 60.0, times, shares) == pytest.approx([least] * 64)


@pytest.mark.parametrize("policy", [lab.DStack(reject=True), lab.Temporal(drop_late=True), lab.Nexus()], ids=lambda p: p.name)
def test_no_policy_passes_it(policy):
    known = profile(light=(1.0, 0.2, 30), heavy=(4.0, 2.0, 70))
    services = [lab.Service("light", 15, lab.Poisson(300)), lab.Service("heavy", 40, lab.Poisson(48))]
    same = {"seeds": (0, 1), "duration_ms": 3000.0}
    top = ceiling(services, known, **same)
    reached = lab.max_load(policy, services, known, step=0.2, tolerance=0.05, **same)
    assert reached.load <= top.load
    assert top.load < 1  # requests that come one by one cannot fill the cheapest batches


def test_it_says_what_is_needed():
    known = profile(light=(1.0, 0.2, 30))
    top = ceiling([lab.Service("light", 15, lab.Poisson(300))], known, seeds=(0,), duration_ms=1000)
    loads = list(top.needed)
    assert loads == sorted(loads)
    assert all(np.diff(list(top.needed.values())) >= 0)
    assert str(top) == f"no schedule keeps 0.99 of every service's requests within SLO beyond load {top.load:.3f}"
    with pytest.raises(ValueError, match="attainment"):
        ceiling([lab.Service("light", 15, lab.Poisson(300))], known, attainment=0)

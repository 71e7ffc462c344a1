"""Lanes: the queue's chain against a simulation and closed forms; the shares against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.policies import lanes as rooms
from dstack_lab.policies.lanes import TIE, lanes, late_part
from dstack_lab.policies.windows import plan_period

SHARES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)


def lindley(rate_rps, ms, most, slo_ms, requests=60_000, seed=3):
    """Part of Poisson requests that are late where whatever waits is launched as soon as the last batch has ended."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1000 / rate_rps, requests))
    head, free, late = 0, 0.0, 0
    while head < requests:
        start = max(free, times[head])
        end = head + 1
        while end < requests and end - head < most and times[end] <= start:
            end += 1
        free = start + ms[end - head - 1]
        late += int((free - times[head:end] > slo_ms + 1e-9).sum())
        head = end
    return late / requests


@pytest.mark.parametrize(("rate", "slo"), [(150, 40), (400, 40), (600, 30), (900, 60)])
def test_late_part_is_what_a_queue_shows(rate, slo):
    known = table(2.0, 0.6, 60, batch_max=32)
    ms = [known.at(b, 50) for b in range(1, 33)]
    assert late_part(known, 50, slo, rate) == pytest.approx(lindley(rate, ms, 32, slo), abs=0.01)


def test_late_part_at_its_ends():
    known = table(10, 0, 1, batch_max=8)
    assert late_part(known, 50, 9, 100) == 1  # even alone it is late
    assert late_part(known, 50, 50, 0) == 0
    assert late_part(known, 50, 50, 1e-3) < 1e-4
    assert late_part(known, 50, 20, 100) == pytest.approx(0, abs=1e-5)  # two batches fit: only a queue beyond 8 is late
    assert late_part(known, 50, 50, 5000) > 0.5  # 50 come while 8 are served


@given(rate=st.floats(50, 1200), slo=st.floats(10, 100), share=st.sampled_from([50.0, 75.0, 100.0]))
@settings(max_examples=15, deadline=None)
def test_late_part_of_any_queue(rate, slo, share):
    known = table(1.0, 0.4, 70, batch_max=16)
    ms = [known.at(b, share) for b in range(1, 17)]
    most = sum(one <= slo for one in ms)  # a longer batch would be late anyway
    found = late_part(known, share, slo, rate)
    assert 0 <= found <= 1
    if rate * ms[most - 1] < 800 * most:  # beyond that queues grow, and how far is a matter of when one stops
        assert found == pytest.approx(lindley(rate, ms, most, slo, 20_000), abs=0.04)


def test_lanes_beside_brute_force():
    asked = plan(
        ("a", 40, lab.Poisson(500), 50.0, 8, table(1, 0.8, 80, batch_max=16)),
        ("b", 80, lab.Poisson(200), 50.0, 8, table(2, 1.5, 80, batch_max=16)),
        ("c", 60, lab.Poisson(100), 50.0, 8, table(3, 1.0, 60, batch_max=16)),
        shares=SHARES,
    )
    points, worst = lanes(asked)
    assert sum(p.gpu_pct for p in points) <= 100

    def worst_of(chosen):
        return max(late_part(t, g, s.slo_ms, s.rate_rps) for s, t, g in zip(asked.services, asked.tables, chosen, strict=True))

    best = min(worst_of(c) for c in itertools.product(SHARES, repeat=3) if sum(c) <= 100)
    assert worst_of([p.gpu_pct for p in points]) == pytest.approx(best, abs=1e-9)
    assert worst == pytest.approx(best, abs=3 * TIE)


def test_more_services_than_the_smallest_share_allows_have_no_lanes():
    asked = plan(*[(n, 100, lab.Poisson(1), 60.0, 1, table(5, 0, 60)) for n in "ab"], shares=(60.0, 100.0))
    assert lanes(asked) == ((), 1.0)


def test_lanes_are_wider_for_whoever_needs_more():
    same = table(1, 0.5, 80, batch_max=16)
    busy = plan(("a", 50, lab.Poisson(700), 50.0, 8, same), ("b", 50, lab.Poisson(100), 50.0, 8, same), shares=SHARES)
    wide, narrow = (p.gpu_pct for p in lanes(busy)[0])
    assert wide > narrow
    hurried = plan(("a", 25, lab.Poisson(300), 50.0, 8, same), ("b", 200, lab.Poisson(300), 50.0, 8, same), shares=SHARES)
    wide, narrow = (p.gpu_pct for p in lanes(hurried)[0])
    assert wide > narrow


def test_the_chain_is_solved_for_what_it_says():
    chance = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]])
    assert rooms._stationary(chance) == pytest.approx([0.25, 0.5, 0.25])


@pytest.mark.parametrize("name", ["C-2", "C-3", "C-4", "C-7"])
def test_half_the_bound_always_has_a_plan_that_rejects_nobody(name):
    known = lab.load_profile("v100-simulated")
    asked = lab.optimize(lab.workload(name, known, load=0.5), known)
    period = plan_period(asked)
    for service in asked.services:
        held = sum(w.batch for w in period.windows if w.service == service.name)
        assert held >= service.rate_rps * period.period_ms / 1000 - 1e-6


@pytest.mark.parametrize("beside", [True, False])
def test_a_service_with_a_far_shorter_slo_gets_its_windows(beside):
    """The period is the longest SLO, 500 ms. A request of the other takes 0.7 ms: its windows come at most 4.3 ms apart."""
    fast, slow = ("fast", 5, lab.Poisson(50), 25.0, 1, table(0.5, 0.2)), ("slow", 500, lab.Poisson(100), 25.0, 4, table(4, 2))
    made = plan(fast, slow)
    period = lab.plan_period(made, beside=beside)
    starts = [w.start_ms for w in period.windows if w.service == "fast"]
    ends = [w.end_ms for w in period.windows if w.service == "fast"]
    following = [*starts[1:], starts[0] + 500]
    assert all(end - ms <= 5 + 1e-6 for ms, end in zip(starts, [*ends[1:], ends[0] + 500], strict=True))
    assert all(end <= ms + 1e-6 for end, ms in zip(ends, following, strict=True))
    trace = lab.simulate(made, lab.DStack(beside=beside), 2000, seed=1)
    assert lab.summary(trace)["slo_attainment"].tolist() == [1, 1, 1]

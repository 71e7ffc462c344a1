"""Each policy's decisions, as a log, on examples small enough to check by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.policies.scoreboard import Scoreboard
from dstack_lab.policies.windows import plan_period
from dstack_lab.services import ServiceTable


def flat(ms: float, batch_max: int = 4) -> ServiceTable:
    """Takes `ms` whatever the batch and share."""
    return ServiceTable(np.full((batch_max, 100), ms))


def at(share: float, ms: float, batch_max: int = 4) -> ServiceTable:
    """Takes `ms` from `share` GPU% up, in proportion longer below."""
    return ServiceTable(np.repeat((ms * np.maximum(1, share / np.arange(1, 101)))[None, :], batch_max, axis=0))


def at_rates(made: lab.Plan, *rates: float) -> lab.Plan:
    """The plan, sized for other rates: replayed arrivals have none worth planning for."""
    sized = tuple(
        lab.Allocation(a.service, a.gpu_pct, a.batch, a.service_ms, rate) for a, rate in zip(made.allocations, rates, strict=True)
    )
    return lab.Plan(made.services, sized, made.tables, made.shares, made.objective, made.provenance)


def log(trace: lab.Trace) -> list[tuple]:
    """(start, end, service, GPU%, batch, note) of each launch."""
    rows = trace.launches[["start_ms", "end_ms", "service", "gpu_pct", "batch", "note"]]
    return [tuple(row) for row in rows.itertuples(index=False)]


class TestTemporal:
    def test_earliest_deadline_first_one_at_a_time(self):
        two = plan(
            ("slow", 100, lab.Replay([0, 1, 2]), 50.0, 4, flat(10)),
            ("fast", 30, lab.Replay([5, 6]), 50.0, 4, flat(10)),
        )
        assert log(lab.simulate(two, lab.Temporal(), 20)) == [
            (0, 10, "slow", 100, 1, ""),  # nobody else waits
            (10, 20, "fast", 100, 2, ""),  # due at 35, before 101
            (20, 30, "slow", 100, 2, ""),
        ]

    def test_the_batch_leaves_time_for_a_request_that_just_missed(self):
        times = table(fixed_ms=2, per_item_ms=1, knee_pct=100)  # L(b, 100) = 2 + b
        one = plan(("a", 20, lab.Replay([0.0] * 30), 25.0, 2, times))
        trace = lab.simulate(one, lab.Temporal(), 10)
        assert trace.launches["batch"].tolist() == [8, 8, 8, 6]  # 2 · (2 + 8) = 20

    def test_overload_serves_everything_late_or_drops_what_is_lost(self):
        burst = plan(("a", 25, lab.Replay([0.0] * 8), 25.0, 2, flat(10, 2)))
        served = lab.simulate(burst, lab.Temporal(), 10)
        assert served.launches["end_ms"].tolist() == [10, 20, 30, 40]
        assert lab.summary(served)["slo_attainment"].iloc[0] == 0.5
        dropped = lab.simulate(burst, lab.Temporal(drop_late=True), 10)
        assert dropped.requests["outcome"].value_counts().to_dict() == {"served": 4, "dropped": 4, "unserved": 0}
        assert log(dropped)[-1] == (10, 20, "a", 100, 2, "")

    def test_an_empty_queue_is_an_idle_gpu(self):
        one = plan(("a", 100, lab.Replay([5, 50]), 25.0, 4, flat(10)))
        assert [row[:2] for row in log(lab.simulate(one, lab.Temporal(), 100))] == [(5, 15), (50, 60)]


class TestPeriodPlan:
    def test_windows_by_hand(self):
        """a: SLO 50, 10 ms at 60 %; b: SLO 100, 20 ms at 60 %: they cannot overlap, so b waits for a.

        Two windows of a in 100 ms are too few: a request that just missed one waits 50 ms and takes 10.
        """
        two = plan(
            ("a", 50, lab.Poisson(10), 60.0, 4, at(60, 10)),
            ("b", 100, lab.Poisson(10), 60.0, 4, at(60, 20)),
            shares=(60.0, 100.0),
        )
        period = plan_period(two)
        assert period.period_ms == 100
        third = 100 / 3
        found = [(w.service, w.start_ms, w.end_ms, w.batch, w.next_end_ms) for w in period.windows]
        assert [row[0] for row in found] == ["a", "b", "a", "a", "b"]
        assert [row[1:] for row in found if row[0] == "a"] == [
            pytest.approx((0, 10, 1, third + 10)),
            pytest.approx((third, third + 10, 1, 2 * third + 10)),
            pytest.approx((2 * third, 2 * third + 10, 1, 110)),
        ]
        assert [row[1:] for row in found if row[0] == "b"] == [
            pytest.approx((10, 30, 1, 2 * third + 30)),
            pytest.approx((2 * third + 10, 2 * third + 30, 1, 130)),  # from 50 on, but not beside a
        ]

    def test_windows_that_fit_side_by_side_overlap(self):
        two = plan(("a", 50, lab.Poisson(10), 50.0, 4, at(50, 10)), ("b", 50, lab.Poisson(10), 50.0, 4, at(50, 10)))
        assert [(w.service, w.start_ms) for w in plan_period(two).windows] == [("a", 0), ("b", 0), ("a", 25), ("b", 25)]

    def test_a_share_gives_way_when_windows_cannot_be_placed(self):
        """Two networks that each want 75 % for most of the period run side by side at 50 % instead."""
        points = [(name, 100, lab.Poisson(40), 75.0, 8, at(60, 30, 8)) for name in ("a", "b", "c")]
        period = plan_period(plan(*points[:2]))
        assert {w.gpu_pct for w in period.windows} <= {50.0, 75.0, 25.0}
        check_windows(period, plan(*points[:2]))

    def test_no_plan_says_who_asks_for_what(self):
        three = plan(*[(name, 50, lab.Poisson(100), 100.0, 4, at(100, 24)) for name in "abc"])
        with pytest.raises(lab.InfeasiblePlan, match=r"a 100 % for 24\.0 ms at 100/s within 50 ms, b 100 %"):
            plan_period(three)

    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(1, 5),
        slos=st.lists(st.sampled_from([25.0, 40.0, 50.0, 100.0]), min_size=5, max_size=5),
        rates=st.lists(st.floats(1, 300), min_size=5, max_size=5),
        knees=st.lists(st.floats(10, 100), min_size=5, max_size=5),
    )
    def test_windows_never_exceed_the_gpu_and_keep_every_slo(self, n, slos, rates, knees):
        points = [(f"s{i}", slos[i], lab.Poisson(rates[i]), 50.0, 4, table(1, 0.3, knees[i])) for i in range(n)]
        asked = plan(*points)
        try:
            period = plan_period(asked)
        except lab.InfeasiblePlan:
            return
        check_windows(period, asked)


def check_windows(period, asked):
    turns = [(w.start_ms + k * period.period_ms, w.end_ms + k * period.period_ms, w) for w in period.windows for k in (0, 1, 2)]
    for start, _, _ in turns:
        active = [w for a, b, w in turns if a <= start + 1e-6 < b]
        assert sum(w.gpu_pct for w in active) <= 100 + 1e-6
        assert len({w.service for w in active}) == len(active)
    for service, allocation in zip(asked.services, period.allocations, strict=True):
        mine = sorted((a, b, w) for a, b, w in turns if w.service == service.name)
        for (a, _, _), (_, end, _) in itertools.pairwise(mine):
            assert end - a <= service.slo_ms + 1e-6  # a request that just missed a window is served by the next
        per_period = sum(w.batch for w in period.windows if w.service == service.name)
        assert per_period >= service.rate_rps * period.period_ms / 1000 - 1e-6
        assert allocation.gpu_pct in asked.shares


class TestDStack:
    def test_planned_then_opportunistic_by_hand(self):
        """a at 60 % has windows at 0, 33 and 67, b at 60 % from 10 (see TestPeriodPlan)."""
        two = plan(
            ("a", 50, lab.Replay([0, 12, 31]), 60.0, 1, at(60, 10)),
            ("b", 100, lab.Replay([1, 2]), 60.0, 2, at(60, 20)),
            shares=(60.0, 100.0),
        )
        two = at_rates(two, 10, 10)
        assert log(lab.simulate(two, lab.DStack(pool=False), 60)) == [
            (0, 10, "a", 60, 1, "planned"),
            (10, 30, "b", 60, 2, "planned"),
            (30, 40, "a", 60, 1, "opportunistic"),  # arrived at 12; takes the place of its window at 33
            (40, 50, "a", 60, 1, "opportunistic"),
        ]

    def test_an_opportunistic_launch_never_delays_a_planned_window(self):
        """b waits at 50 but would still run at 66.7, when a's window needs the share: it lets a go first."""
        two = plan(
            ("a", 50, lab.Replay([66.0]), 60.0, 1, at(60, 10)),
            ("b", 100, lab.Replay([50.0]), 60.0, 1, at(60, 20)),
            shares=(60.0, 100.0),
        )
        two = at_rates(two, 10, 10)
        starts = {row[2]: row[0] for row in log(lab.simulate(two, lab.DStack(patience=0, pool=False), 80))}
        assert starts == {"a": 66, "b": 76}

    def test_the_least_served_goes_first(self):
        """Both wait; a has received GPU time, b none: b goes first although a's deadline is nearer."""
        points = [
            ("a", 50, lab.Replay([0.0, 0.1, 0.2, 0.3]), 100.0, 1, at(100, 5, 1)),
            ("b", 60, lab.Replay([1.0, 1.1]), 100.0, 1, at(100, 5, 1)),
        ]
        both = at_rates(plan(*points, shares=(100.0,)), 10, 10)
        fair = log(lab.simulate(both, lab.DStack(planned=False), 20))
        rush = log(lab.simulate(both, lab.DStack(planned=False, fair=False), 20))
        assert [row[2] for row in fair] == ["a", "b", "a", "b", "a", "a"]
        assert [row[2] for row in rush] == ["a", "a", "a", "a", "b", "b"]

    def test_backlogged_services_share_the_gpu_fairly(self):
        points = [(f"s{i}", 200, lab.Poisson(300), 50.0, 4, at(50, 10 + 5 * i)) for i in range(4)]
        trace = lab.simulate(plan(*points), lab.DStack(reject=True, planned=False), 20_000, seed=1)
        received = (trace.launches["end_ms"] - trace.launches["start_ms"]) * trace.launches["gpu_pct"]
        by_service = received.groupby(trace.launches["service"], observed=True).sum()
        assert lab.jain(by_service) >= 0.95
        assert lab.summary(trace)["dropped"].iloc[-1] > 0

    def test_no_service_starves_under_overload(self):
        points = [
            ("greedy", 50, lab.Poisson(2000), 50.0, 8, table(1, 0.5, 50)),
            ("modest", 100, lab.Poisson(20), 50.0, 4, table(4, 2, 60)),
        ]
        trace = lab.simulate(plan(*points), lab.DStack(reject=True), 10_000, seed=2)
        attained = lab.summary(trace).set_index("service")["slo_attainment"]
        assert attained["modest"] > 0.9
        assert attained["greedy"] > 0.2

    def test_overload_is_served_in_full_batches_of_what_is_not_lost(self):
        """16 requests at 0, due at 25: 4 in 10 ms each; at 20 the rest, which would end at 30, is dropped. It starts afresh."""
        one = at_rates(plan(("a", 25, lab.Replay([0.0] * 16 + [40.0] * 4), 100.0, 4, flat(10)), shares=(100.0,)), 200)
        trace = lab.simulate(one, lab.DStack(planned=False, patience=0, reject=True), 50)
        assert [row[:2] + row[4:5] for row in log(trace)] == [(0, 10, 4), (10, 20, 4), (40, 50, 4)]
        assert trace.requests["outcome"].tolist() == ["served"] * 8 + ["dropped"] * 8 + ["served"] * 4

    def test_a_burst_is_served_in_batches_of_what_waits(self):
        one = at_rates(plan(("a", 100, lab.Replay([0.0] + [10.0] * 6), 50.0, 4, flat(10, 8)), shares=(50.0, 100.0)), 10)
        batches = lab.simulate(one, lab.DStack(planned=False, patience=0), 20).launches["batch"].tolist()
        assert batches == [1, 6]  # more than the planned 4: the oldest is still in time

    def test_an_empty_queue_leaves_the_gpu_idle_and_ends(self):
        one = plan(("a", 100, lab.Replay([500.0]), 50.0, 4, flat(10)), shares=(50.0, 100.0))
        trace = lab.simulate(one, lab.DStack(), 1000)
        assert len(trace.launches) == 1
        assert trace.requests["outcome"].tolist() == ["served"]

    def test_beats_temporal_where_networks_cannot_use_the_whole_gpu(self):
        """Two networks with knees at 40 %: side by side they serve what one at a time cannot."""
        points = [(name, 60, lab.Poisson(420), 50.0, 8, table(4, 1, 40)) for name in ("a", "b")]
        both = plan(*points)
        dstack, temporal = (lab.summary(lab.simulate(both, p, 20_000, seed=3)).iloc[-1] for p in (lab.DStack(), lab.Temporal()))
        assert dstack["slo_attainment"] > 0.99
        assert temporal["slo_attainment"] < 0.5


def test_the_scoreboard_forgets_after_its_memory():
    board = Scoreboard(["a", "b"], period_ms=100, memory=3)
    board.add(0, "a", 500)
    board.add(150, "b", 200)
    assert board.received == {"a": 500, "b": 200}
    board.add(310, "b", 50)  # a's period is the fourth back
    assert board.received == {"a": 0, "b": 250}


def test_a_policy_states_the_shares_it_needs():
    two = plan(("a", 50, lab.Poisson(10), 50.0, 4, at(50, 10)), ("b", 50, lab.Poisson(10), 25.0, 4, at(25, 10)))
    assert lab.Temporal().shares(two) == {"a": (100.0,), "b": (100.0,)}
    assert lab.DStack(pool=False).shares(two) == {"a": (50.0,), "b": (50.0,)}  # equal queues: lanes that fill the GPU
    slots = lab.cut_slots(two, drop=False)
    assert lab.DStack().shares(two) == {"a": slots.gpu_pct[:1], "b": slots.gpu_pct[1:]}
    assert (lab.DStack().copies(two), lab.DStack(pool=False).copies(two)) == (max(slots.copies), 1)
    assert lab.DStack(beside=False).shares(two) == {"a": (50.0,), "b": (25.0,)}  # the plan's own points, in turn
    assert lab.Policy().shares(two) == {"a": (50.0, 100.0), "b": (25.0, 100.0)}
    with pytest.raises(NotImplementedError, match=r"Policy\.decide"):
        lab.Policy().decide(None)

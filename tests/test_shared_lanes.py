"""Plans that know of contention: the queue of a shared lane against the engine, lanes by hand and by brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.contention import Contention
from dstack_lab.metrics import gpu_time
from dstack_lab.policies import Policy
from dstack_lab.policies.lane_keeper import LaneKeeper
from dstack_lab.policies.lane_queue import Rider, late_in_turns
from dstack_lab.policies.shared_lanes import HOPELESS, SharedLane, SharedLanes, _Planner, share_lanes
from dstack_lab.recipes import plan_of, recipe_of
from dstack_lab.services import ServiceTable
from dstack_lab.trials import plan_for

SHARES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)


def knowing(made: lab.Plan, *constants: float) -> lab.Plan:
    return replace(made, contention=Contention(*constants))


class TestQueue:
    def test_who_has_to_begin_first_begins(self):
        """a must begin by 6, b by 7: a runs twice, to 4 and to 8, then b until 13, one late."""
        a, b = Rider([0.0, 0.0], 10, 1, [4.0], 4.0), Rider([0.0], 12, 1, [5.0], 5.0)
        assert late_in_turns([a, b], drop=False) == [0, 1]
        assert late_in_turns([a, b], drop=True) == [0, 1]  # given up at 8, when 5 ms no longer reach 12
        assert late_in_turns([a._replace(batch=2, times_ms=[4.0, 5.0]), b], drop=False) == [0, 0]  # to 5, then to 10

    def test_giving_up_early_saves_the_others(self):
        """Two come at 0, due at 5: one batch of 4 ms each. Serving the lost one makes the one of 4 ms late as well."""
        crowd = Rider([0.0, 0.0, 4.0], 5, 1, [4.0], 4.0)
        assert late_in_turns([crowd], drop=False) == [2 / 3]  # ends at 4, 8 and 12
        assert late_in_turns([crowd], drop=True) == [1 / 3]  # 0 to 4, one given up, 4 to 8

    def test_nothing_asked_is_nothing_late(self):
        assert late_in_turns([Rider([], 5, 1, [4.0])], drop=True) == [0]

    @given(
        rates=st.lists(st.floats(20, 400), min_size=1, max_size=3),
        drop=st.booleans(),
        hopeless=st.sampled_from(HOPELESS),
        fair_ms=st.sampled_from([0.0, 20.0]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=30, deadline=None)
    def test_is_what_the_engine_does(self, rates, drop, hopeless, fair_ms, seed):
        """The same requests in a lane alone on the GPU: the same ones are late or given up, of every service."""
        times = [table(1 + i, 0.5, 20, 8) for i in range(len(rates))]
        slos = [20.0 + 15 * i for i in range(len(rates))]
        rng = np.random.default_rng(seed)
        came = [np.unique(rng.integers(0, 400_000, int(rate * 0.4))) / 1000 for rate in rates]
        asked = plan(*[(f"s{i}", slos[i], lab.Replay(c), 100.0, 8, times[i]) for i, c in enumerate(came)])
        lane = SharedLane(100.0, asked.allocations, (1.0,) * len(rates), hopeless, fair_ms)

        class Keeps(Policy):
            def reset(self, plan):
                self.keeper = LaneKeeper(SharedLanes((lane,), {}, 1.0), drop)

            def decide(self, state):
                return self.keeper.decide(state)

        trace = lab.simulate(asked, Keeps(), 400)
        took = trace.requests["finish_ms"] - trace.requests["arrival_ms"]
        in_time = took <= trace.requests["service"].map(dict(zip([s.name for s in asked.services], slos, strict=True))).astype(
            float
        )
        seen = 1 - in_time.groupby(trace.requests["service"], observed=False).mean()
        riders = []
        for c, slo, t in zip(came, slos, times, strict=True):
            ms = [t.at(b, 100) for b in range(1, 9)]
            riders.append(Rider(c.tolist(), slo, 8, ms, ms[int(hopeless * 8) - 1]))
        assert late_in_turns(riders, drop, fair_ms) == pytest.approx(seen.tolist(), abs=1e-9)


FLAT = {ms: ServiceTable(np.full((1, 100), float(ms))) for ms in (1, 4, 16)}


class TestLanes:
    def test_slowdown_by_hand(self):
        """Two lanes of networks that no share makes faster: 1 and 16 ms long, 1 + 0.096 · 16 ** 0.1 and the inverse."""
        both = plan(
            ("short", 40, lab.Poisson(500), 50.0, 1, FLAT[1]), ("long", 80, lab.Poisson(30), 50.0, 1, FLAT[16]), shares=SHARES
        )
        shared = share_lanes(knowing(both), drop=True)
        slow = {p.service: (s, p.service_ms) for lane in shared.lanes for p, s in zip(lane.points, lane.slowdown, strict=True)}
        assert len(shared.lanes) == 2
        assert slow["short"] == pytest.approx((1 + 0.096 * 16**0.1, 1.127), abs=0.005)
        assert slow["long"] == pytest.approx((1 + 0.096 / 16**0.1, 16 * 1.073), abs=0.1)

    def test_as_a_table(self):
        known = lab.load_profile("v100-simulated")
        plan = lab.optimize(lab.workload("C-4", known, 0.65), known, contention=Contention())
        table = lab.share_lanes(plan).to_frame()
        assert sorted(table["service"]) == sorted(s.name for s in plan.services)
        assert table.groupby("lane")["gpu_pct"].first().sum() <= 100
        alone = [plan.tables[[s.name for s in plan.services].index(r.service)].at(r.batch, r.gpu_pct) for r in table.itertuples()]
        assert (table["service_ms"] / alone).tolist() == pytest.approx(table["slowdown"].tolist())
        assert "knows of Contention(slowdown=0.096" in repr(plan)

    def test_a_lane_for_all_feels_nobody(self):
        """Networks that fill the GPU gain nothing side by side: with any slowdown they take turns, undisturbed."""
        full = [(n, 60, lab.Poisson(120), 50.0, 8, table(2, 1, 100, 16)) for n in "abc"]
        shared = share_lanes(knowing(plan(*full, shares=SHARES), 0.3), drop=True)
        assert [lane.slowdown for lane in shared.lanes] == [(1.0, 1.0, 1.0)]
        assert shared.lanes[0].gpu_pct == 100

    def test_the_more_they_cost_each_other_the_fewer_lanes(self):
        small = plan(*[(n, 60, lab.Poisson(150), 25.0, 8, table(4, 1, 30, 16)) for n in "abcd"], shares=SHARES)
        counts = [len(share_lanes(knowing(small, c), drop=True).lanes) for c in (0.001, 0.3, 3.0)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] == 1

    @pytest.mark.parametrize("slowdown", [0.02, 0.096, 0.3])
    def test_beside_brute_force(self, slowdown):
        """All ways to share lanes, all widths: what merging and widening finds is hardly worse than the best."""
        asked = plan(
            ("a", 40, lab.Poisson(420), 50.0, 8, table(1, 0.8, 80, 16)),
            ("b", 80, lab.Poisson(170), 50.0, 8, table(2, 1.5, 80, 16)),
            ("c", 60, lab.Poisson(120), 50.0, 8, table(3, 1.0, 60, 16)),
            shares=SHARES,
        )
        asked = knowing(asked, slowdown)
        planner, best = _Planner(asked, True, 20), float("inf")
        for groups in (((0,), (1,), (2,)), ((0, 1), (2,)), ((0, 2), (1,)), ((1, 2), (0,)), ((0, 1, 2),)):
            for widths in itertools.product(range(len(SHARES)), repeat=len(groups)):
                if sum(SHARES[w] for w in widths) <= 100:
                    slow = planner.slowed(groups, widths)
                    late = [x for g, w, s in zip(groups, widths, slow, strict=True) for x in planner.late(g, w, s)[0]]
                    rates = [s.rate_rps for s in asked.services]
                    late = [x for _, x in sorted(zip([m for g in groups for m in g], late, strict=True))]
                    best = min(best, max(late) + np.average(late, weights=rates))
        found = share_lanes(asked, drop=True)
        pain = max(found.late.values()) + np.average(
            [found.late[s.name] for s in asked.services], weights=[s.rate_rps for s in asked.services]
        )
        assert best - 1e-9 <= pain <= best + 0.02
        assert sum(lane.gpu_pct for lane in found.lanes) <= 100

    @given(
        rates=st.lists(st.floats(0.5, 800), min_size=1, max_size=5),
        slowdown=st.floats(0.001, 1),
        drop=st.booleans(),
        knee=st.floats(10, 100),
    )
    @settings(max_examples=20, deadline=None)
    def test_every_service_rides_once_and_the_gpu_is_enough(self, rates, slowdown, drop, knee):
        asked = plan(
            *[(f"s{i}", 50, lab.Poisson(r), 50.0, 4, table(1, 0.5, knee, 8)) for i, r in enumerate(rates)], shares=SHARES
        )
        try:
            found = share_lanes(knowing(asked, slowdown), drop)
        except lab.InfeasiblePlan:
            assert not drop
            return
        assert sorted(p.service for lane in found.lanes for p in lane.points) == sorted(s.name for s in asked.services)
        assert sum(lane.gpu_pct for lane in found.lanes) <= 100 + 1e-6
        assert all(s >= 1 for lane in found.lanes for s in lane.slowdown)
        assert drop or found.fullest <= 1 + 1e-9
        for lane in found.lanes:
            for point in lane.points:
                assert point.gpu_pct == lane.gpu_pct
                assert point.batch == 1 or 2 * point.service_ms <= 50 + 0.5

    def test_rates_that_no_lanes_hold_have_no_plan_unless_some_are_given_up(self):
        many = knowing(plan(*[(n, 50, lab.Poisson(2000), 50.0, 8, table(1, 0.5, 80)) for n in "ab"], shares=SHARES))
        with pytest.raises(lab.InfeasiblePlan, match="a at 2000/s within 50 ms"):
            share_lanes(many, drop=False)
        assert share_lanes(many, drop=True).fullest > 1

    def test_many_services_are_planned_soon(self):
        crowd = plan(*[(f"s{i}", 100, lab.Poisson(10), 10.0, 2, table(1, 0.5, 30)) for i in range(24)], shares=SHARES)
        found = share_lanes(knowing(crowd), drop=True)
        assert len(found.lanes) <= 10
        assert max(found.late.values()) < 0.01


class TestPlans:
    def test_contention_without_effect_changes_nothing(self):
        known = lab.load_profile("v100-simulated")
        services = lab.workload("C-3", known, 0.7)
        plain, told = (lab.optimize(services, known, contention=c) for c in (None, Contention(slowdown=0)))
        assert told.allocations == plain.allocations
        one, other = (lab.simulate(p, lab.DStack(), 2000, seed=1) for p in (plain, told))
        assert other.launches.equals(one.launches)
        assert other.requests.equals(one.requests)

    def test_a_run_costs_what_the_plan_expects_unless_told_otherwise(self):
        known = lab.load_profile("v100-simulated")
        told = plan_for(lab.workload("C-4", known, 0.65), known, "efficacy", None, Contention())
        default, same, free = (
            lab.simulate(told, lab.DStack(reject=True), 1000, 1, contention=c) for c in (None, Contention(), Contention(0))
        )
        assert default.launches.equals(same.launches)
        alone = [
            told.tables[i].at(b, g)
            for i, b, g in zip(free.launches["service"].cat.codes, free.launches["batch"], free.launches["gpu_pct"], strict=True)
        ]
        assert (free.launches["end_ms"] - free.launches["start_ms"]).tolist() == pytest.approx(alone, abs=1e-5)
        assert (same.launches["end_ms"] - same.launches["start_ms"]).sum() > 1.02 * sum(
            told.tables[i].at(b, g)
            for i, b, g in zip(same.launches["service"].cat.codes, same.launches["batch"], same.launches["gpu_pct"], strict=True)
        )

    def test_service_times_of_a_plan_stay_those_alone(self):
        """What is true of the GPU is applied by whoever runs the plan, once."""
        known = lab.load_profile("v100-simulated")
        services = lab.workload("C-2", known, 0.5)
        plan = lab.optimize(services, known, contention=Contention())
        assert plan.allocations == lab.optimize(services, known).allocations
        with pytest.raises(ValueError, match="contention = 1"):
            replace(plan, contention=1)

    def test_a_recipe_keeps_it(self):
        known = lab.load_profile("v100-simulated")
        plan = lab.optimize(lab.workload("C-2", known, 0.5), known, contention=Contention(0.05, 0.2))
        assert plan_of(recipe_of(plan, lab.DStack()), plan.services).contention == Contention(0.05, 0.2)
        old = {k: v for k, v in recipe_of(plan, lab.DStack()).items() if k != "contention"}
        assert plan_of(old, plan.services).contention is None

    def test_it_is_not_compiled_and_says_so(self, monkeypatch):
        monkeypatch.setattr("dstack_lab.compiled.MANY", 100)
        monkeypatch.setattr("dstack_lab.compiled.obstacle", lambda policy: "")
        known = lab.load_profile("v100-simulated")
        plan = lab.optimize(lab.workload("C-2", known, 0.5), known, contention=Contention())
        marks = lab.simulate(plan, lab.DStack(), 1000).provenance.marks
        assert "python engine: service times scatter or launches slow each other" in marks

    def test_a_device_prepares_the_lanes_shares(self):
        known = lab.load_profile("v100-simulated")
        plan = plan_for(lab.workload("C-4", known, 0.65), known, "efficacy", None, Contention())
        policy = lab.DStack(reject=True)
        used = (
            lab.simulate(plan, policy, 500, contention=Contention())
            .launches.groupby("service", observed=True)["gpu_pct"]
            .unique()
        )
        for service, shares in policy.shares(plan).items():
            assert set(used[service]) == set(shares)


@pytest.mark.parametrize("profile", ["v100-simulated", "h200-simulated"])
@pytest.mark.parametrize("name", ["C-2", "C-3", "C-4"])
def test_told_of_contention_it_serves_no_less_than_turns_do(profile, name):
    """Under one rule, with real contention: D-STACK beside Temporal, which nobody disturbs."""
    known = lab.load_profile(profile)
    policies = {"D-STACK": lab.DStack(), "Temporal": lab.Temporal()}
    asked = lab.workload(name, known, 1.0)
    duration = 3000 if profile.startswith("v100") else 600
    raced = lab.compare(
        asked, known, policies, (0.5, 0.65, 0.8, 0.95), (1, 2), duration, contention=Contention(), admission="one rule"
    )
    whole = raced[raced["service"] == "all"].pivot(index="load", columns="policy", values="slo_attainment")
    assert (whole["D-STACK"] >= whole["Temporal"] - 0.002).all(), whole


def test_not_told_it_believes_times_that_do_not_hold():
    known = lab.load_profile("v100-simulated")
    asked = lab.workload("C-4", known, 1.0)
    same = {"seeds": (1, 2), "duration_ms": 3000, "contention": Contention(), "admission": "one rule"}
    told, untold = (lab.compare(asked, known, [lab.DStack()], (0.65,), told=told, **same) for told in (True, False))
    gain = [t.loc[t["service"] == "all", "slo_attainment"].item() for t in (told, untold)]
    assert gain[0] > gain[1] + 0.2


@pytest.mark.parametrize(("profile", "name"), [("v100-simulated", "C-3"), ("v100-simulated", "C-7"), ("h200-simulated", "C-4")])
@pytest.mark.parametrize("load", [1.5, 3.0])
def test_beyond_the_bound_lanes_are_shared_fairly(profile, name, load):
    """Every service alone asks for more than its equal part: nobody starves, and GPU time is shared evenly."""
    known = lab.load_profile(profile)
    plan = plan_for(lab.workload(name, known, load), known, "efficacy", None, Contention())
    trace = lab.simulate(plan, lab.DStack(reject=True), 4000 if profile.startswith("v100") else 1000, seed=2)
    attained = lab.summary(trace).set_index("service")["slo_attainment"]
    assert lab.jain(gpu_time(trace)) >= 0.95
    assert (attained * load >= 0.5).all(), attained

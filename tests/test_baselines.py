"""The systems that D-STACK is compared with: each one's decisions as a log, on examples checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from builders import plan, table

import dstack_lab as lab
from dstack_lab.policies.batching import adapted_batch, saturated_batch
from dstack_lab.policies.clipper import Regression
from dstack_lab.policies.gpulet import Part, ideal_partition, split
from dstack_lab.policies.ideal import ideal_table
from dstack_lab.policies.packing import pack
from dstack_lab.services import ServiceTable

QUIET = lab.Contention(slowdown=0)  # so that turns can be checked by hand
TENS = tuple(float(share) for share in range(10, 101, 10))


def step(share: float, ms, batch_max: int = 4) -> ServiceTable:
    """Takes `ms`, or ``ms(batch)``, from `share` GPU% up, and twice as long below: its knee is `share` exactly."""
    times = np.array([ms(b) if callable(ms) else float(ms) for b in range(1, batch_max + 1)])
    return ServiceTable(times[:, None] * np.where(np.arange(1, 101) < share, 2, 1))


def log(trace: lab.Trace) -> list[tuple]:
    """(start, end, service, batch) of each launch."""
    rows = trace.launches[["start_ms", "end_ms", "service", "batch"]]
    return [(start, pytest.approx(end, abs=1e-5), name, batch) for start, end, name, batch in rows.itertuples(index=False)]


def dropped(trace: lab.Trace) -> int:
    return int((trace.requests["outcome"] == "dropped").sum())


def at_rates(made: lab.Plan, *rates: float) -> lab.Plan:
    """The plan, sized for these rates."""
    points = zip(made.allocations, rates, strict=True)
    sized = tuple(lab.Allocation(a.service, a.gpu_pct, a.batch, a.service_ms, rate) for a, rate in points)
    return lab.Plan(made.services, sized, made.tables, made.shares, made.objective, made.provenance)


#: Each system, by what it may be told about late requests.
SYSTEMS = {
    "Uncontrolled": lab.Uncontrolled,
    "adaptive": lambda **late: lab.Uncontrolled("adaptive", **late),
    "Triton": lab.Triton,
    "Triton delay": lambda **late: lab.Triton(4, 3.0, **late),
    "Clipper aimd": lab.Clipper,
    "Clipper regression": lambda **late: lab.Clipper("regression", **late),
    "Nexus": lab.Nexus,
    "Gslice": lab.Gslice,
    "Gpulet": lab.Gpulet,
    "MaxThroughput": lab.MaxThroughput,
    "MaxMin": lab.MaxMin,
    "Ideal": lab.Ideal,
}
DROPPERS = {"Clipper regression", "Ideal", "Nexus"}
every_system = pytest.mark.parametrize("system", SYSTEMS)


def pair(first, second, slo: float = 60.0) -> lab.Plan:
    times = table(2, 1, 40)
    return plan(("a", slo, first, 50.0, 4, times), ("b", 2 * slo, second, 40.0, 4, times), shares=TENS)


class TestEverySystem:
    @every_system
    def test_an_empty_queue_is_an_idle_gpu(self, system):
        trace = lab.simulate(at_rates(pair(lab.Replay([500.0]), lab.Replay([5000.0])), 10, 10), SYSTEMS[system](), 1000)
        assert trace.requests["outcome"].tolist() == ["served"]
        assert len(trace.launches) == 1
        assert trace.launches["start_ms"].iloc[0] <= 500 + 15  # at once, or after its own wait for company

    @every_system
    def test_a_burst_is_served_or_dropped_to_the_last(self, system):
        burst = at_rates(pair(lab.Replay([5.0] * 60), lab.Replay([6.0] * 20)), 100, 100)
        trace = lab.simulate(burst, SYSTEMS[system](), 100)
        assert (trace.requests["outcome"] != "unserved").all()
        if system not in DROPPERS:
            assert dropped(trace) == 0
        assert trace.launches["batch"].max() > 1

    @every_system
    def test_overload_each_as_its_system_does_and_under_one_rule(self, system):
        overload = pair(lab.Poisson(3000), lab.Poisson(1000))
        own, keep, drop = (
            lab.simulate(overload, SYSTEMS[system](**late), 1000, seed=1)
            for late in ({}, {"drop_late": False}, {"drop_late": True})
        )
        assert (dropped(own) > 0) == (system in DROPPERS)
        assert dropped(keep) == 0
        assert dropped(drop) > 0
        assert (keep.requests["outcome"] == "served").all()
        limit = drop.requests["service"].map({"a": 60, "b": 120}).astype(float)
        waited = drop.requests["start_ms"] - drop.requests["arrival_ms"]
        assert (waited.dropna() <= limit[waited.notna()]).all()  # nothing hopeless was launched

    @every_system
    def test_it_forgets_at_reset(self, system):
        policy, asked = SYSTEMS[system](), pair(lab.Poisson(200), lab.Poisson(100))
        first, second = (lab.simulate(asked, policy, 1000, seed=3) for _ in range(2))
        assert first.launches.equals(second.launches)

    @every_system
    def test_it_launches_only_at_shares_it_names(self, system):
        if system == "Ideal":
            pytest.skip("no device can run it")
        policy, asked = SYSTEMS[system](), pair(lab.Poisson(200), lab.Poisson(100))
        named = policy.shares(asked)
        launched: list = []
        decide = policy.decide

        def spy(state):
            decisions = decide(state)
            launched.extend(d for d in decisions if isinstance(d, lab.Launch))
            return decisions

        policy.decide = spy
        lab.simulate(asked, policy, 1000, seed=3)
        assert {launch.gpu_pct for launch in launched if launch.service == "a"} <= set(named["a"])
        assert {launch.gpu_pct for launch in launched if launch.service == "b"} <= set(named["b"])


class TestBatches:
    def test_saturated(self):
        times = step(100, lambda b: 2 + b, 16)
        assert saturated_batch(times, 20, 100) == 8  # 2 · (2 + 8) = 20
        assert saturated_batch(times, 20, 100, padding=1.15) == 6  # 1.15 · 2 · (2 + 6) = 18.4
        assert saturated_batch(times, 5, 100) == 1  # nothing fits

    @pytest.mark.parametrize(
        ("learnt", "batch", "took", "limit", "following"),
        [
            (13, 13, 24.0, 25, 13),  # within 10 %
            (3, 3, 27.2, 25, 3),
            (13, 13, 40.0, 25, 9),  # 15 over, 3.08 each: 4 less
            (1, 1, 39.0, 25, 1),
            (2, 2, 40.0, 25, 1),  # 15 over, 20 each: at least one less
            (4, 4, 10.0, 25, 10),  # 15 left, 2.5 each: 6 more
            (1, 1, 20.0, 25, 2),  # 5 left, 20 each: at least one more
            (60, 60, 10.0, 25, 64),  # never more
            (13, 2, 10.0, 25, 13),  # not full: says nothing
            (13, 2, 40.0, 25, 12),  # not full and late all the same: 15 over, 20 each
            (13, 2, 26.0, 25, 2),  # not full, and as late as may be
        ],
    )
    def test_adapted(self, learnt, batch, took, limit, following):
        assert adapted_batch(learnt, batch, took, limit) == following


class TestUncontrolled:
    def test_all_at_once_and_in_each_others_way(self):
        """a is alone for 4 of its 10 ms, then half as fast until 16; by then b has 6 of its 10 ms done, and ends at 20."""
        both = plan(*[(n, 100, lab.Replay([t]), 50.0, 4, step(100, 10)) for n, t in (("a", 0.0), ("b", 4.0))])
        assert log(lab.simulate(both, lab.Uncontrolled(), 20, contention=QUIET)) == [(0, 16, "a", 1), (4, 20, "b", 1)]

    def test_batches(self):
        """Alone: 2 · (2 + b) <= 20. Learnt from 2 on: 4 ms leave 16, 2 each: 8 more; 12 ms leave 8: 6 more; 18 ms are right."""
        burst = plan(("a", 20, lab.Replay([0.0] * 46), 50.0, 2, step(100, lambda b: 2 + b, 20)))
        of = {b: lab.simulate(burst, lab.Uncontrolled(b), 10).launches["batch"].tolist() for b in ("alone", "plan", "adaptive")}
        assert of["alone"] == [8, 8, 8, 8, 8, 6]
        assert of["plan"] == [2] * 23
        assert of["adaptive"] == [2, 10, 16, 16, 2]
        with pytest.raises(ValueError, match="batches = 'large'"):
            lab.Uncontrolled("large")


class TestTriton:
    def test_a_free_instance_takes_what_waits(self):
        one = plan(("a", 100, lab.Replay([0, 1, 2, 3, 3, 3, 3]), 50.0, 1, step(100, 10)))
        assert log(lab.simulate(one, lab.Triton(), 20)) == [(0, 10, "a", 1), (10, 20, "a", 4), (20, 30, "a", 2)]

    def test_the_delay_ends_when_the_batch_is_full_or_the_oldest_has_waited(self):
        """2 and 3 fill the batch at 3; that of 20 waits until 25. The plan's batch of 1 means nothing to it."""
        one = plan(("a", 100, lab.Replay([2, 3, 20]), 50.0, 1, step(100, 10)))
        assert log(lab.simulate(one, lab.Triton(2, 5.0), 40)) == [(3, 13, "a", 2), (25, 35, "a", 1)]

    def test_overload_is_served_late_and_models_run_at_once(self):
        points = [(n, 25, lab.Replay([0.0] * 4), 50.0, 1, step(100, 10)) for n in "ab"]
        trace = lab.simulate(plan(*points), lab.Triton(2), 10, contention=QUIET)
        assert log(trace) == [(0, 20, "a", 2), (0, 20, "b", 2), (20, 40, "a", 2), (20, 40, "b", 2)]
        assert lab.summary(trace)["slo_attainment"].iloc[-1] == 0.5

    @pytest.mark.parametrize(("arguments", "message"), [((0,), "max_batch = 0"), ((4, -1.0), "delay_ms = -1")])
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            lab.Triton(*arguments)


class TestClipper:
    def test_aimd_one_more_after_success_a_tenth_less_after_a_miss(self):
        """10 ms a request, SLO 25: 1 and 2 fit, 3 miss: int(0.9 · 3) = 2; the last 2 are all that is left."""
        burst = plan(("a", 25, lab.Replay([0.0] * 10), 50.0, 1, step(100, lambda b: 10 * b)))
        assert lab.simulate(burst, lab.Clipper(), 10).launches["batch"].tolist() == [1, 2, 3, 2, 2]

    def test_regression_explores_while_the_budget_allows_then_drops_what_expired(self):
        """2 + b ms, SLO 25. 1 was never seen, so 2 at once, five times; at 20 the budget of 0.92 · 5 = 4.6 is more than 4: 3.

        They end at 25, when the rest is due.
        """
        burst = plan(("a", 25, lab.Replay([0.0] * 30), 50.0, 1, step(100, lambda b: 2 + b, 16)))
        trace = lab.simulate(burst, lab.Clipper("regression"), 10)
        assert [(row[0], row[3]) for row in log(trace)] == [(0, 2), (4, 2), (8, 2), (12, 2), (16, 2), (20, 3)]
        assert dropped(trace) == 17

    def test_regression_predicts_when_a_batch_took_longer_than_the_budget(self):
        """2 · b ms: 1, 2 and 3 took up to 6. 6 ms left are a budget of 5.52, enough for 2.76; 7 are 6.44, more than ever."""
        policy = lab.Clipper("regression")
        policy.reset(plan(("a", 30, lab.Replay([0.0]), 50.0, 1, step(100, lambda b: 2 * b, 16))))
        for batch in (1, 2, 3):
            policy.learnt["a"].add(batch, 2.0 * batch)
        view = type("View", (), {"name": "a", "batch_max": 16})
        assert policy._most(view, 6.0) == 2
        assert policy._most(view, 7.0) == 2  # the largest chosen, again until it was seen five times

    def test_exploring(self):
        line = Regression()
        noise = np.random.default_rng(0)
        assert line.explore(noise) == 2  # 1 was never seen
        line.add(1, 2.0)
        for _ in range(4):
            assert line.explore(noise) == 1  # not seen five times yet
            line.add(1, 2.0)
        assert line.explore(noise) == 2
        line.largest = 40
        steps = [line.explore(noise) for _ in range(500)]
        assert min(steps) == 40  # never smaller
        assert np.mean(steps) == pytest.approx(44 - 0.5, abs=0.5)  # a tenth more, rounded down

    def test_a_straight_line(self):
        line = Regression()
        assert line.within(100) == 1
        line.add(3, 5.0)
        assert line.within(100) == line.within(1) == 3  # one point is no line
        line = Regression()
        for batch in (1, 2, 4):
            line.add(batch, 2 + batch)
        assert (line.within(10), line.within(2.5), line.longest_ms) == (8, 1, 6)
        line.add(4, 8.0)  # (3, 1), (4, 2), (7, 4): slope 57/78 through (14/3, 7/3)
        assert line.within(10) == 6  # 6.23

    def test_a_straight_line_keeps_away_from_what_scatters(self):
        """Variance 0.8 of five batches of 2; pooled 4 · 0.8 / (5 - 3) = 1.6: 3.79 ms less to spend."""
        line = Regression()
        line.add(1, 3.0)
        line.add(4, 6.0)
        for took in (3.0, 5.0, 3.0, 5.0, 4.0):
            line.add(2, took)
        assert line.within(10) == 4  # 10 - 2 - 3.79
        assert line.within(10.8) == 5

    def test_regression_keeps_up_warm_and_collapses_near_saturation_as_published(self):
        """Batches of 21 serve 840/s within half the SLO; at 500/s it learns in time, at 800/s its budget is always that of 1."""
        times = table(4, 1, 100, 64)
        mean = {}
        for rate in (500, 800):
            one = plan(("a", 50, lab.Poisson(rate), 100.0, 16, times))
            mean[rate] = lab.summary(lab.simulate(one, lab.Clipper("regression"), 5000, seed=1)).iloc[-1]
        assert mean[500]["slo_attainment"] > 0.99
        assert mean[800]["slo_attainment"] < 0.1
        assert mean[800]["mean_batch"] < 2

    def test_one_at_a_time_the_nearest_deadline_first(self):
        points = [("a", 90, lab.Replay([0, 1]), 50.0, 1, step(100, 10)), ("b", 30, lab.Replay([2]), 50.0, 1, step(100, 10))]
        trace = lab.simulate(plan(*points), lab.Clipper(), 10)
        assert log(trace) == [(0, 10, "a", 1), (10, 20, "b", 1), (20, 30, "a", 1)]

    @pytest.mark.parametrize("arguments", [{"mode": "guess"}, {"delay_ms": -1}, {"seed": -1}])
    def test_bad_arguments_are_named(self, arguments):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            lab.Clipper(**arguments)


class TestNexus:
    def test_packing_by_hand(self):
        """L(b) = 2 + b. a, SLO 20: saturated at 8 in 10 ms, 800/s, so one whole GPU, and 200/s are left.

        Alone the rest of a takes 3 in 5 ms, every 15: 5 + 15 = 20. b, SLO 40 at 100/s: 3 in 5 ms, every
        30. c, SLO 16 at 500/s: 4 in 6 ms, every 8. c is fullest; a does not fit beside it (2 in 4 ms:
        10 > 8) nor b (1 in 3: 9 > 8); b fits beside a: 2 in 4 ms, every 15.
        """
        times = step(100, lambda b: 2 + b, 16)
        services = [lab.Service(n, slo, lab.Poisson(r)) for n, slo, r in (("a", 20, 1000), ("b", 40, 100), ("c", 16, 500))]
        nodes = pack(services, [times] * 3, [1000, 100, 500])
        found = [(round(n.duty_ms, 6), n.batches, round(n.occupancy, 3)) for n in nodes]
        assert found == [(10, {"a": 8}, 1), (8, {"c": 4}, 0.75), (15, {"a": 3, "b": 2}, 0.6)]

    def test_a_rate_too_low_for_a_duty_cycle_still_gets_its_turn(self):
        """1/s with an SLO of 20: nobody waits a second; served alone, its cycle leaves time for its batch."""
        (node,) = pack([lab.Service("a", 20, lab.Poisson(1))], [step(100, 5.0)], [1])
        assert (node.duty_ms, node.batches) == (15, {"a": 1})

    def test_turns_go_round(self):
        points = [(n, 100, lab.Replay([0.0] * k), 50.0, 4, step(100, 10)) for n, k in (("a", 6), ("b", 2))]
        trace = lab.simulate(at_rates(plan(*points), 100, 100), lab.Nexus(), 10)
        assert log(trace) == [(0, 10, "a", 4), (10, 20, "b", 2), (20, 30, "a", 2)]

    def test_early_drop_shrinks_the_batch_then_gives_up(self):
        """5 ms a request, SLO 25, target 2. At 20 two are left until 26: not in 10 ms, but one in 5; at 25 the other is lost."""
        one = plan(("a", 25, lab.Replay([0.0] * 3 + [1.0] * 3), 50.0, 4, step(100, lambda b: 5 * b)))
        trace = lab.simulate(at_rates(one, 1000), lab.Nexus(), 10)
        assert log(trace) == [(0, 10, "a", 2), (10, 20, "a", 2), (20, 25, "a", 1)]
        assert dropped(trace) == 1

    def test_a_new_epoch_plans_for_the_rates_it_saw(self):
        """Sized for 20/s, where batches hardly gather; 400/s come."""
        one = at_rates(plan(("a", 100, lab.Deterministic(400), 50.0, 1, step(100, lambda b: 2 + b / 2, 32))), 20)
        policy = lab.Nexus(epoch_ms=1000)
        policy.reset(one)
        small = policy.batch["a"]
        lab.simulate(one, policy, 2500)
        assert policy.rates["a"] == pytest.approx(400, rel=0.02)
        assert policy.batch["a"] > small
        steady = lab.Nexus(epoch_ms=1000)
        lab.simulate(at_rates(one, 395), steady, 2500)
        assert steady.rates["a"] == 395  # within 0.8 to 1.1 of it nothing is planned anew


class TestGslice:
    def test_slices_are_in_proportion_to_knees_and_undisturbed(self):
        points = [(n, 100, lab.Replay([0.0, 0.0]), 50.0, 1, step(knee, 10, 1)) for n, knee in (("a", 80), ("b", 80), ("c", 40))]
        trace = lab.simulate(plan(*points, shares=TENS), lab.Gslice(resize=False), 10)
        assert trace.launches["gpu_pct"].tolist() == [40, 40, 20] * 2
        assert trace.launches["end_ms"].tolist() == [20, 20, 20, 40, 40, 40]  # all below their knees
        roomy = plan(*points[2:], shares=TENS)
        assert lab.simulate(roomy, lab.Gslice(), 10).launches["gpu_pct"].tolist() == [40, 40]  # never above the knee

    def test_the_batch_grows_to_the_slo(self):
        """5 ms a request, SLO 25: 2 take 10 and leave 15, so 3 more; 5 take 25 and stay."""
        burst = plan(("a", 25, lab.Replay([0.0] * 17), 50.0, 2, step(50, lambda b: 5 * b, 16)), shares=TENS)
        assert lab.simulate(burst, lab.Gslice(resize=False), 10).launches["batch"].tolist() == [2, 5, 5, 5]
        half = lab.simulate(burst, lab.Gslice(resize=False, slo_part=0.4), 10)
        assert half.launches["batch"].tolist() == [2] * 8 + [1]

    def test_the_fifth_equal_recommendation_is_applied(self):
        both = plan(*[(n, 50, lab.Poisson(50), 40.0, 4, step(40, 10)) for n in "ab"], shares=TENS)
        policy = lab.Gslice()
        policy.reset(both)
        for _ in range(4):
            policy._recommend("a", 4, 25, 50)  # half the SLO: half the share
        policy._recommend("a", 4, 50, 50)  # 50 of 50 ms: as it is, which is below 3 % and breaks the row
        for times in range(5):
            assert policy.share["a"] == 40, times
            policy._recommend("a", 4, 25, 50)
        assert policy.share == {"a": 20, "b": 40}
        for _ in range(5):
            policy._recommend("b", 4, 100, 50)  # twice the SLO: twice the share
        assert policy.share == {"a": 20, "b": 80}
        for _ in range(5):
            policy._recommend("a", 4, 100, 50)
        assert policy.share["a"] == 20  # no room

    def test_shares_follow_load(self):
        """b asks for little; a, which started with as much, gets what b does not need."""
        times = table(1, 0.5, 100, 32)
        points = [("a", 60, lab.Poisson(900), 50.0, 8, times), ("b", 60, lab.Poisson(100), 50.0, 8, times)]
        policy = lab.Gslice()
        moving = lab.summary(lab.simulate(plan(*points, shares=TENS), policy, 5000, seed=1))
        fixed = lab.summary(lab.simulate(plan(*points, shares=TENS), lab.Gslice(resize=False), 5000, seed=1))
        assert policy.share["a"] > 50 > policy.share["b"]
        assert moving["goodput_rps"].iloc[-1] > fixed["goodput_rps"].iloc[-1]

    def test_a_new_share_waits_for_its_standby(self):
        """The same launches as without a standby until the first switch, which comes 700 ms later."""
        times = table(1, 0.5, 100, 32)
        points = [("a", 60, lab.Poisson(900), 50.0, 8, times), ("b", 60, lab.Poisson(100), 50.0, 8, times)]
        made = plan(*points, shares=TENS)
        at_once, waits = (lab.simulate(made, lab.Gslice(switch_ms=ms), 5000, seed=1).launches for ms in (0.0, 700.0))
        first = [runs.loc[runs["gpu_pct"] != 50, "start_ms"].min() for runs in (at_once, waits)]
        assert first[0] + 700 <= first[1] < first[0] + 900
        decided = int((waits["start_ms"] < first[0]).sum())
        assert waits[:decided].equals(at_once[:decided])
        with pytest.raises(ValueError, match="switch_ms = -1"):
            lab.Gslice(switch_ms=-1)

    @pytest.mark.parametrize("shares", [{"a": 60.0, "b": 60.0}, {"a": 50.0}])
    def test_slices_that_do_not_fit_are_refused(self, shares):
        with pytest.raises(lab.InfeasiblePlan, match="together at most 100"):
            lab.simulate(pair(lab.Poisson(10), lab.Poisson(10)), lab.Gslice(shares), 10)


class TestGpulet:
    #: b ms for b requests from 40 GPU% up, in proportion longer below. SLO 20: 500/s at 20 % (5 in 10 ms), 1000/s from 40 on.
    TIMES = ServiceTable(np.arange(1.0, 17)[:, None] * np.maximum(1, 40 / np.arange(1.0, 101)))

    @pytest.mark.parametrize(("rate", "ideal"), [(300, 20), (600, 40), (5000, 40)])
    def test_ideal_partition(self, rate, ideal):
        assert ideal_partition(self.TIMES, 20, rate) == ideal

    def test_a_network_that_needs_more_than_the_small_partitions(self):
        slow = step(80, 9, 1)  # at less than 80 % it misses its SLO
        assert ideal_partition(slow, 20, 10) == 80

    @pytest.mark.parametrize(
        ("rates", "parts"),
        [
            ((500, 300), {"a": Part(0, 40), "b": Part(0, 40)}),  # 0.55 + 0.33 of the smallest part: best fit
            ((800, 300), {"a": Part(0, 40), "b": Part(1, 60)}),  # 0.88 + 0.33 are too much for one
            ((100, 100), {"a": Part(0, 20), "b": Part(0, 20)}),
            ((2000, 500), {"a": Part(0, 40), "b": Part(1, 60)}),  # overload: where least is in use
        ],
    )
    def test_split(self, rates, parts):
        services = [lab.Service(n, 20, lab.Poisson(r)) for n, r in zip("ab", rates, strict=True)]
        assert split(services, [self.TIMES] * 2, rates) == parts

    def test_two_partitions_at_once_turns_within_each(self):
        points = [(n, 20, lab.Replay([t]), 50.0, 1, self.TIMES) for n, t in (("a", 0.0), ("b", 0.0), ("c", 0.5))]
        made = at_rates(plan(*points, shares=TENS), 800, 300, 300)
        trace = lab.simulate(made, lab.Gpulet(), 10)
        assert trace.launches["gpu_pct"].tolist() == [40, 60, 60]
        assert log(trace) == [(0, 1, "a", 1), (0, 1, "b", 1), (1, 2, "c", 1)]

    def test_a_partition_is_no_larger_than_what_the_plan_s_device_grants(self):
        points = [(n, 20, lab.Replay([0.0]), 50.0, 1, self.TIMES) for n in "abc"]
        made = at_rates(plan(*points, shares=(12.12, 36.36, 48.48, 54.55, 100.0)), 800, 300, 300)
        assert lab.Gpulet().shares(made) == {"a": (36.36,), "b": (54.55,), "c": (54.55,)}  # 40 and 60
        halves = at_rates(plan(*points, shares=(50.0, 100.0)), 800, 300, 300)
        assert lab.Gpulet().shares(halves) == {"a": (50.0,), "b": (50.0,), "c": (50.0,)}  # two cores: none smaller
        whole = at_rates(plan(*points, shares=(100.0,)), 800, 300, 300)
        assert lab.Gpulet().shares(whole) == {"a": (100.0,), "b": (100.0,), "c": (100.0,)}
        assert len(lab.simulate(whole, lab.Gpulet(), 10).launches) == 3  # in turns


class TestGreedy:
    POINTS = (
        ("cheap", 100, lab.Replay([0.0] * 3), 60.0, 1, step(10, 10, 1)),
        ("dear", 100, lab.Replay([0.0] * 3), 70.0, 1, step(10, 20, 1)),
        ("small", 100, lab.Replay([0.0]), 30.0, 1, step(10, 40, 1)),  # least worth, but it fits beside the others
    )

    def test_the_most_requests_per_gpu_time_first(self):
        trace = lab.simulate(plan(*self.POINTS, shares=TENS), lab.MaxThroughput(), 10)
        assert [row[:3] for row in log(trace)] == [
            (0, 10, "cheap"),
            (0, 40, "small"),
            (10, 20, "cheap"),
            (20, 30, "cheap"),
            (30, 50, "dear"),
            (50, 70, "dear"),
            (70, 90, "dear"),
        ]

    def test_the_least_served_first_and_waited_for(self):
        """At 0 small, which would fit, does not pass dear, which waits for 70 %. At 40 cheap has received 1200, dear 1400."""
        trace = lab.simulate(plan(*self.POINTS, shares=TENS), lab.MaxMin(), 10)
        assert [row[:3] for row in log(trace)] == [
            (0, 10, "cheap"),
            (10, 30, "dear"),
            (10, 50, "small"),
            (30, 40, "cheap"),
            (40, 50, "cheap"),
            (50, 70, "dear"),
            (70, 90, "dear"),
        ]

    def test_two_extremes_of_fairness(self):
        points = [("a", 50, lab.Poisson(900), 60.0, 4, step(60, 4)), ("b", 50, lab.Poisson(300), 60.0, 4, step(60, 12))]
        received = {}
        for policy in (lab.MaxThroughput(drop_late=True), lab.MaxMin(drop_late=True)):
            runs = lab.simulate(plan(*points, shares=TENS), policy, 5000, seed=1).launches
            area = ((runs["end_ms"] - runs["start_ms"]) * runs["gpu_pct"]).groupby(runs["service"], observed=False).sum()
            received[policy.name] = lab.jain(area)
        assert received["MaxMin"] > 0.99 > received["MaxThroughput"]


class TwoKernels:
    """4 ms from 20 GPU% up, then 6 ms from 100 % up; in proportion longer below; b requests take b times as long."""

    def kernel_ms(self, batch, gpu_pct):
        share = np.atleast_1d(gpu_pct)
        return batch * np.array([4 * np.maximum(1, 20 / share), 6 * np.maximum(1, 100 / share)])


class TestIdeal:
    def test_each_kernel_at_its_own_share(self):
        """4 ms at 20 % and 6 at 100 %: 10 ms at 68 % on average, where one share for both takes 100 %."""
        times = ideal_table(TwoKernels(), 2)
        assert times.at(1, 68) == times.at(1, 100) == pytest.approx(10)
        assert times.at(1, 34) == pytest.approx(20, rel=0.01)
        assert times.at(2, 68) == pytest.approx(20)

    def test_it_schedules_what_no_whole_batch_could(self):
        """a at 69 % (1.5 % above its least), b, which takes 4 ms from 30 % up, beside it; whole batches at 100 % cannot."""
        whole = TwoKernels().kernel_ms(1, np.arange(1, 101)).sum(axis=0)[None, :]
        points = [
            ("a", 24, lab.Replay([0.0]), 100.0, 1, ServiceTable(whole)),
            ("b", 24, lab.Replay([0.0]), 30.0, 1, step(30, 4, 1)),
        ]
        made = at_rates(plan(*points, shares=TENS), 1, 1)

        class One:
            def kernel_ms(self, batch, gpu_pct):
                return batch * 4 * np.maximum(1, 30 / np.atleast_1d(gpu_pct))[None, :]

        trace = lab.simulate(made, lab.Ideal({"a": TwoKernels(), "b": One()}, patience=0), 10)
        assert trace.requests["start_ms"].tolist() == [0, 0]
        assert trace.launches["gpu_pct"].tolist() == [69, 30]
        assert trace.launches["end_ms"].tolist() == [10, 4]
        alone = lab.simulate(made, lab.Temporal(), 10)
        assert alone.requests["start_ms"].tolist() != [0, 0]

    def test_it_needs_every_kernel_and_no_device_runs_it(self):
        made = pair(lab.Poisson(10), lab.Poisson(10))
        with pytest.raises(ValueError, match=r"kernels = \['a'\]: must be with a model of b"):
            lab.simulate(made, lab.Ideal({"a": TwoKernels()}), 10)
        with pytest.raises(ValueError, match="must be simulated"):
            lab.Ideal().shares(made)

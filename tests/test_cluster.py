"""Several GPUs: placements beside brute force, dispatch beside its definition, merged traces beside their parts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from builders import SIMULATED, profile
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.cluster import demand
from dstack_lab.cluster.demand import Deadlines, demands
from dstack_lab.cluster.packing import REPLICA_GAIN_PCT, Packing
from dstack_lab.policies.windows import plan_period

SLOW = profile(a=(2, 1, 60), b=(1, 0.5, 30), c=(4, 2, 90))
FAST = profile(a=(1, 0.3, 80), b=(1, 0.1, 50), d=(1, 1, 40))


def services(**rates: float) -> tuple[lab.Service, ...]:
    slo = {"a": 50, "b": 40, "c": 100, "d": 60}
    return tuple(lab.Service(name, slo[name], lab.Poisson(float(rate))) for name, rate in rates.items())


def check_placed(placement: lab.Placement) -> None:
    """What holds for every placement."""
    for service in placement.services:
        mine = placement.of(service.name)
        assert sum(r.rate_rps for r in mine) == pytest.approx(service.rate_rps, rel=1e-12)
        assert sum(r.part for r in mine) == pytest.approx(1, rel=1e-12)
        assert len({r.gpu for r in mine}) == len(mine) > 0
    assert max(placement.demand_pct.values()) == placement.peak_pct <= 100 + 1e-6
    profiles = dict(zip(placement.cluster.names, placement.cluster.profiles(), strict=True))
    for gpu, plan in placement.plans.items():
        assert plan.demand_pct <= 100 + 1e-6
        assert [(r.service, r.rate_rps) for r in placement.replicas if r.gpu == gpu] == [
            (a.service, a.rate_rps) for a in plan.allocations
        ]
        assert all(s.model in profiles[gpu].models for s in plan.services)
        if placement.method == "dstack":
            plan_period(plan)
    assert {r.gpu for r in placement.replicas} == placement.plans.keys()


class TestCluster:
    def test_constructing_reads_no_file(self):
        cluster = lab.Cluster(gpus=("no-such", "no-such", "other"))
        assert len(cluster) == 3
        assert cluster.names == ("gpu0", "gpu1", "gpu2")
        with pytest.raises(ValueError, match=r"'no-such': must be an existing CSV file or one of .*v100-simulated"):
            cluster.profiles()

    def test_equal_and_different_gpus(self):
        equal = lab.Cluster(gpus=3, profile=SLOW)
        assert equal.profiles() == (SLOW, SLOW, SLOW)
        named = lab.Cluster(gpus={"old": SLOW, "new": FAST})
        assert named.names == ("old", "new")
        assert named.kinds() == ((SLOW, FAST), (0, 1))
        assert lab.Cluster(gpus=[SLOW, FAST, SLOW]).device == "2 x toy GPU + 1 x toy GPU"
        assert repr(named) == "Cluster(old: toy GPU, new: toy GPU)"

    def test_files_are_read_once(self):
        cluster = lab.Cluster(gpus=2)
        assert cluster.profiles()[0] is cluster.profiles()[1]
        assert cluster.device.startswith("2 x V100")

    @pytest.mark.parametrize("gpus", [0, -1, True, 1.5, (), {}, "v100-simulated", (SLOW, 3), {"": SLOW}, {1: SLOW}, [""], None])
    def test_bad_input(self, gpus):
        with pytest.raises(ValueError, match="must be"):
            lab.Cluster(gpus=gpus)

    @pytest.mark.parametrize("wrong", [(), (1,), 5, services(a=1) * 2, services(a=1) + (lab.Service("zz", 50, lab.Poisson(1)),)])
    def test_bad_services(self, wrong):
        for call in (lab.place, lab.cluster_bound):
            with pytest.raises(ValueError, match="must be"):
                call(wrong, lab.Cluster(gpus=2, profile=SLOW))

    def test_bad_arguments_of_place(self):
        cluster = lab.Cluster(gpus=2, profile=SLOW)
        for wrong in ({"method": "best"}, {"objective": "x"}, {"max_replicas": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                lab.place(services(a=1), cluster, **wrong)
        with pytest.raises(ValueError, match="cluster = 2"):
            lab.place(services(a=1), 2)


class TestBound:
    @pytest.mark.parametrize("rates", [(50, 100, 20), (500, 1000, 200)])
    def test_one_gpu_is_the_bound_of_that_gpu(self, rates):
        asked = services(**dict(zip("abc", rates, strict=True)))
        one, whole = lab.bound(asked, SLOW), lab.cluster_bound(asked, lab.Cluster(gpus=1, profile=SLOW))
        assert whole.total_rps == pytest.approx(one.total_rps)
        assert [row[0] for row in whole.area_pct_ms.values()] == pytest.approx(one.area_pct_ms)
        needed = sum(s.rate_rps * a for s, a in zip(asked, one.area_pct_ms, strict=True))
        assert whole.load == pytest.approx(needed / 100_000)

    @pytest.mark.parametrize("gpus", [2, 5])
    def test_equal_gpus_serve_so_many_times_as_much(self, gpus):
        asked = services(a=400, b=900, c=100)
        one = lab.bound(asked, SLOW)
        many = lab.cluster_bound(lab.scaled(asked, gpus), lab.Cluster(gpus=gpus, profile=SLOW))
        assert many.total_rps == pytest.approx(gpus * one.total_rps)

    @settings(max_examples=15)
    @given(rates=st.tuples(*[st.floats(50, 20_000)] * 2), number=st.tuples(*[st.integers(1, 3)] * 2))
    def test_different_gpus_beside_brute_force(self, rates, number):
        """Give a part of each kind's time to a, the rest to b, in steps; at most the best of these steps is missed."""
        asked = services(a=rates[0], b=rates[1])
        cluster = lab.Cluster(gpus=(SLOW,) * number[0] + (FAST,) * number[1])
        bound = lab.cluster_bound(asked, cluster)
        most = np.array(
            [[n * 100_000 / lab.bound([s], p).area_pct_ms[0] for p, n in ((SLOW, number[0]), (FAST, number[1]))] for s in asked]
        )
        part = np.linspace(0, 1, 201)
        x, y = part[:, None], part[None, :]
        served = np.minimum(rates[0], x * most[0, 0] + y * most[0, 1])
        served = served + np.minimum(rates[1], (1 - x) * most[1, 0] + (1 - y) * most[1, 1])
        assert served.max() <= bound.total_rps * (1 + 1e-9)
        assert served.max() >= bound.total_rps - most.max(axis=0).sum() / 200

    def test_a_model_that_a_gpu_does_not_know_is_served_elsewhere(self):
        cluster = lab.Cluster(gpus=(SLOW, FAST))
        bound = lab.cluster_bound(services(c=10_000, d=10_000), cluster)
        assert bound.rates_rps["c"] == pytest.approx(lab.bound(services(c=10_000), SLOW).total_rps)
        assert bound.rates_rps["d"] == pytest.approx(lab.bound(services(d=10_000), FAST).total_rps)
        assert bound.area_pct_ms["c"][1] == np.inf
        assert bound.to_frame()["bound_rps"].iloc[-1] == bound.total_rps

    def test_an_slo_that_no_gpu_keeps(self):
        with pytest.raises(lab.InfeasiblePlan, match="no GPU of the cluster serves a within slo_ms = 1 "):
            lab.cluster_bound([lab.Service("a", 1, lab.Poisson(1))], lab.Cluster(gpus=2, profile=SLOW))


def partitions(count: int, gpus: int, grains: int):
    """Every way to put the grains of each service on GPUs."""
    one = [parts for parts in itertools.product(range(grains + 1), repeat=gpus) if sum(parts) == grains]
    for chosen in itertools.product(one, repeat=count):
        yield [tuple(parts[g] for parts in chosen) for g in range(gpus)]


def bent(sizes: list[float], grains: int) -> np.ndarray:
    """Demands that fall less than the rate: small parts make small batches."""
    part = np.arange(grains + 1) / grains
    return np.outer(sizes, part**0.8)


class TestPacking:
    @settings(max_examples=60)
    @given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4))
    def test_whole_services_on_two_equal_gpus_are_packed_best(self, sizes):
        packing = Packing(bent(sizes, 1)[None], (0, 0), most_replicas=1)
        best = min(
            max(sum(itertools.compress(sizes, mask)), sum(sizes) - sum(itertools.compress(sizes, mask)))
            for mask in itertools.product((0, 1), repeat=len(sizes))
        )
        assert packing.peak(packing.best())[0] == pytest.approx(best)

    @settings(max_examples=40)
    @given(sizes=st.lists(st.integers(1, 90), min_size=4, max_size=7), gpus=st.integers(2, 3))
    def test_more_services_are_packed_within_a_ninth(self, sizes, gpus):
        packing = Packing(bent(sizes, 1)[None], (0,) * gpus, most_replicas=1)
        best = min(
            max(sum(s for s, g in zip(sizes, at, strict=True) if g == k) for k in range(gpus))
            for at in itertools.product(range(gpus), repeat=len(sizes))
        )
        assert packing.peak(packing.best())[0] <= best * 10 / 9 + 1e-6

    @settings(max_examples=25)
    @given(
        slow=st.lists(st.integers(10, 150), min_size=3, max_size=3), faster=st.lists(st.floats(0.2, 1.5), min_size=3, max_size=3)
    )
    def test_split_services_on_different_gpus_beside_brute_force(self, slow, faster):
        """All that four quarters of three services on two GPUs allow: a local search has no proven factor."""
        best, found = self.beside_brute_force(slow, faster)
        assert best <= found <= max(best * 1.5, best + REPLICA_GAIN_PCT)

    def test_split_services_are_nearly_always_within_a_tenth_of_brute_force(self):
        """Of 300 fixed instances; of 60,000 drawn while this was written, 0.7 % were further off and the worst by 27 %."""
        rng = np.random.default_rng(0)
        pairs = [self.beside_brute_force(rng.integers(10, 151, 3).tolist(), rng.uniform(0.2, 1.5, 3)) for _ in range(300)]
        within = [found <= max(best * 1.1, best + REPLICA_GAIN_PCT) for best, found in pairs]
        assert np.mean(within) >= 0.97

    @staticmethod
    def beside_brute_force(slow, faster):
        """Highest demand of the best placement there is, and of the one that was found; every quarter is placed once."""
        costs = np.array([bent(slow, 4), bent([s * f for s, f in zip(slow, faster, strict=True)], 4)])
        packing = Packing(costs, (0, 1), most_replicas=2)
        found = packing.best()
        assert np.sum(found, axis=0).tolist() == [4, 4, 4]
        return min(packing.peak(rows)[0] for rows in partitions(3, 2, 4)), packing.peak(found)[0]

    def test_what_is_barred_is_searched_around(self):
        packing = Packing(bent([40, 40, 30, 30], 1)[None], (0, 0), most_replicas=1)
        assert packing.peak(packing.best()) == [70, 70]
        for pair in ((1, 0, 1, 0), (1, 0, 0, 1)):
            packing.forbid(0, pair)
        found = packing.best()
        assert sorted(found) == [(0, 0, 1, 1), (1, 1, 0, 0)]
        asked = Packing(
            bent([40, 40, 30, 30], 1)[None], (0, 0), 1, allowed=lambda kind, row: row[0] + row[2] < 2 and row[0] + row[3] < 2
        )
        assert sorted(asked.best()) == sorted(found)

    def test_demands_by_hand(self):
        """a at 60 %: 2 + b ms; at 100/s within 50 ms three requests fill in 20 ms, and smaller batches cost more each."""
        found = demands(services(a=100), SLOW, "dstack", 2)
        ms = 2 + np.arange(1, 17)
        for k, rate in ((1, 50), (2, 100)):
            fits = [
                (60 * m / b)
                for b, m in enumerate(ms, 1)
                if 2 * m <= 50 and (b - 1) * 1000 / rate + m <= 50 and rate * m <= 1000 * b
            ]
            assert found[0, k] == pytest.approx(rate * min(fits) / 1000, rel=0.05)  # the fit of the profile rounds
        assert demands(services(d=1), SLOW, "dstack", 2)[0].tolist() == [0, np.inf, np.inf]
        assert demands([lab.Service("a", 1, lab.Poisson(1))], SLOW, "dstack", 1)[0, 1] == np.inf


class TestPlace:
    @settings(max_examples=12)
    @given(
        rates=st.tuples(*[st.floats(1, 300)] * 4),
        gpus=st.sampled_from([(SLOW, FAST), (SLOW, FAST, FAST), (FAST, SLOW, SLOW, SLOW)]),
        method=st.sampled_from(["dstack", "temporal"]),
    )
    def test_every_rate_is_placed_once_and_no_gpu_is_overfull(self, rates, gpus, method):
        asked = services(**dict(zip("abcd", rates, strict=True)))
        cluster = lab.Cluster(gpus=gpus)
        load = lab.cluster_bound(asked, cluster).load
        try:
            placement = lab.place(asked, cluster, method)
        except lab.InfeasiblePlan:
            assert load > 0.3
            return
        check_placed(placement)
        assert placement.peak_pct >= 100 * load * (1 - 1e-9)
        assert {r.gpu for r in placement.of("c")} <= {n for n, p in zip(cluster.names, gpus, strict=True) if p is SLOW}
        again = lab.place(asked, lab.Cluster(gpus=gpus), method)
        assert again.replicas == placement.replicas
        assert [p.to_frame().to_dict() for p in again.plans.values()] == [
            p.to_frame().to_dict() for p in placement.plans.values()
        ]

    def test_a_hot_service_gets_replicas(self):
        """One batch of 16 in 18 ms at a time is 889/s; equal GPUs share more than that evenly."""
        placement = lab.place(services(a=1300), lab.Cluster(gpus=3, profile=SLOW))
        check_placed(placement)
        assert [r.part for r in placement.replicas] == [pytest.approx(1 / 3)] * 3

    def test_the_fewest_replicas_that_do(self):
        placement = lab.place(services(a=20, b=20), lab.Cluster(gpus=2, profile=SLOW))
        assert [(r.service, r.part) for r in sorted(placement.replicas, key=lambda r: r.service)] == [("a", 1), ("b", 1)]
        assert len(placement.plans) == 2
        one = lab.place(services(a=300, b=300), lab.Cluster(gpus=3, profile=SLOW), max_replicas=1)
        assert len(one.replicas) == 2

    def test_exclusive_is_one_service_per_gpu(self):
        asked = services(a=200, b=100, c=20)
        placement = lab.place(asked, lab.Cluster(gpus=5, profile=SLOW), "exclusive")
        check_placed(placement)
        assert all(len(plan.services) == 1 and plan[plan.services[0].name].gpu_pct == 100 for plan in placement.plans.values())
        assert len(placement.of("a")) > 1  # the busiest takes the GPUs that are left
        with pytest.raises(lab.InfeasiblePlan, match=r"on 2 GPUs.*each of the 3 services needs a GPU of its own"):
            lab.place(asked, lab.Cluster(gpus=2, profile=SLOW), "exclusive")

    def test_too_much_says_who_asks_for_how_much(self):
        with pytest.raises(lab.InfeasiblePlan) as caught:
            lab.place(services(a=2000, c=300), lab.Cluster(gpus=(SLOW, SLOW)))
        text = str(caught.value)
        assert "no dstack placement on 2 GPUs" in text
        assert "a 2000/s = " in text
        assert "c 300/s = " in text
        assert "gpu0 " in text
        assert "gpu1 " in text
        with pytest.raises(lab.InfeasiblePlan, match="a asks for slo_ms = 5 at 10/s, but no GPU of the cluster"):
            lab.place([lab.Service("a", 5, lab.Poisson(10))], lab.Cluster(gpus=2, profile=SLOW))

    def test_one_gpu_is_the_plan_of_that_gpu(self):
        asked = services(a=60, b=100)
        placement = lab.place(asked, lab.Cluster(gpus=1, profile=SLOW))
        assert placement.plans["gpu0"].to_frame().equals(lab.optimize(asked, SLOW).to_frame())
        frame = placement.to_frame()
        assert frame["gpu_pct"].tolist() == [a.gpu_pct for a in placement.plans["gpu0"].allocations]
        assert "Placement by dstack on 1 x toy GPU" in repr(placement)
        with pytest.raises(ValueError, match="service = 'x'"):
            placement.of("x")


class TestDeadlines:
    @settings(max_examples=40)
    @given(data=st.data(), fill=st.sampled_from([0.1, 0.25, 0.4]))
    def test_what_passes_keeps_every_deadline(self, data, fill):
        """Batches that come evenly from any first one on, run by non-preemptive earliest deadline first."""
        asked = [lab.Service(m, slo, lab.Poisson(1)) for m, slo in (("a", 50), ("b", 25), ("c", 100))]
        rates = [data.draw(st.floats(1, top)) for top in (150, 300, 60)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demand, "FILLS", (fill,))
            test = Deadlines(asked, SLOW)
            if not test.kept(rates):
                return
        jobs = []
        for service, rate, ms in zip(asked, rates, test._ms, strict=True):
            batch = min(max(1, int(fill * service.slo_ms * rate / 1000)), len(ms))
            gap = 1000 * batch / rate
            first = data.draw(st.floats(0, 1)) * gap
            due = service.slo_ms - 1000 * (batch - 1) / rate
            jobs += [(t, t + due, float(ms[batch - 1])) for t in np.arange(first, 2000, gap)]
        now, waiting, ahead = 0.0, [], sorted(jobs)
        while waiting or ahead:
            if not waiting:
                now = max(now, ahead[0][0])
            while ahead and ahead[0][0] <= now + 1e-9:
                waiting.append(ahead.pop(0))
            job = min(waiting, key=lambda j: j[1])
            waiting.remove(job)
            now += job[2]
            assert now <= job[1] + 1e-6

    def test_a_long_launch_in_the_way(self):
        """c runs for 6 ms or more; beside it a service due within 7 ms of 3 ms launches cannot be kept."""
        asked = [lab.Service("c", 100, lab.Poisson(1)), lab.Service("a", 7, lab.Poisson(1))]
        test = Deadlines(asked, SLOW)
        assert test.kept([20, 0])
        assert test.kept([0, 20])
        assert not test.kept([20, 20])


RNG = np.random.default_rng(0)


class TestDispatch:
    @settings(max_examples=50)
    @given(rates=st.lists(st.floats(0.1, 50), min_size=1, max_size=5))
    def test_round_robin_never_runs_ahead(self, rates):
        chosen = lab.RoundRobin().assign(np.arange(300.0), rates, rates, RNG)
        parts = np.array(rates) / sum(rates)
        sent = np.cumsum(chosen[:, None] == np.arange(len(rates)), axis=0)
        ahead = sent - np.arange(1, 301)[:, None] * parts
        assert ahead.max() <= 1 - 1 / len(rates) + 1e-6
        assert abs(ahead[-1].sum()) < 1e-6

    def test_round_robin_by_hand(self):
        """The example of the nginx documentation of weights 5, 1, 1."""
        chosen = lab.RoundRobin().assign(np.arange(14.0), [5, 1, 1], [5, 1, 1], RNG)
        assert "".join("abc"[k] for k in chosen) == "aabacaa" * 2

    def test_random_follows_the_rates_and_the_seed(self):
        times = np.arange(20_000.0)
        first, second = (lab.Random().assign(times, [1, 3], [1, 3], np.random.default_rng(5)) for _ in range(2))
        assert (first == second).all()
        assert first.mean() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 20_000) ** 0.5)

    @pytest.mark.parametrize(("dispatch", "scv"), [(lab.Random(), 1.0), (lab.RoundRobin(), 0.5)])
    def test_gaps_at_a_replica_of_two(self, dispatch, scv):
        """Poisson arrivals thinned stay Poisson; every second of them is an Erlang-2 stream."""
        times = lab.Poisson(1000).sample(40_000, np.random.default_rng(1))
        chosen = dispatch.assign(times, [1, 1], [1, 1], np.random.default_rng(2))
        gaps = np.diff(times[chosen == 0])
        assert gaps.var() / gaps.mean() ** 2 == pytest.approx(scv, rel=0.08)

    def test_least_work_by_hand(self):
        """10 ms of work a request: both replicas fill in turn; at 100 ms all is done, and the turn goes on."""
        times = np.array([0.0, 0, 1, 15, 15, 100, 200, 300])
        assert lab.LeastWork().assign(times, [1, 1], [100, 100], RNG).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
        # the second GPU would be full at 1000/s: it takes 1 ms a request, and its part of what comes when both are free
        fast = lab.LeastWork().assign(np.array([0.0, 0, 0, 0, 50, 50]), [1, 1], [100, 1000], RNG)
        assert fast.tolist() == [0, 1, 1, 1, 0, 1]

    @settings(max_examples=20)
    @given(full=st.lists(st.floats(20, 200), min_size=2, max_size=4), seed=st.integers(0, 99))
    def test_least_work_joins_the_least_work(self, full, seed):
        times = lab.Gamma(300, cv=3).sample(500, np.random.default_rng(seed))
        work, last = np.zeros(len(full)), 0.0
        for now, k in zip(times, lab.LeastWork().assign(times, full, full, RNG), strict=True):
            work = np.maximum(work - (now - last), 0)
            last = now
            assert work[k] <= work.min() + 1e-5
            work[k] += 1000 / full[k]

    def test_bad_rates(self):
        for dispatch in (lab.RoundRobin(), lab.Random(), lab.LeastWork()):
            assert len(dispatch.assign(np.empty(0), [1, 2], [1, 2], RNG)) == 0
            for wrong in ([], [0, 1], [-1]):
                with pytest.raises(ValueError, match="rates_rps"):
                    dispatch.assign(np.arange(3.0), wrong, wrong, RNG)
        with pytest.raises(ValueError, match="full_rps"):
            lab.LeastWork().assign(np.arange(3.0), [1, 1], [1], RNG)


HOT = services(a=260, b=900, c=60)
PLACED = lab.place(HOT, lab.Cluster(gpus=(SLOW, SLOW, FAST)))


class Greedy(lab.Policy):
    """Asks for more than there is."""

    def decide(self, state):
        return [lab.policies.Launch(state.services[0].name, 100, 99)]


class TestSimulate:
    def test_one_gpu_is_simulate(self):
        asked = services(a=60, b=100)
        placement = lab.place(asked, lab.Cluster(gpus=1, profile=SLOW))
        whole = lab.simulate_cluster(placement, lab.DStack(), 2000, seed=3)
        alone = lab.simulate(lab.optimize(asked, SLOW), lab.DStack(), 2000, seed=3)
        for table in ("requests", "launches", "services"):
            assert getattr(whole.traces["gpu0"], table).equals(getattr(alone, table))
        merged = lab.summary(whole.merged())
        assert np.allclose(merged.drop(columns="service"), lab.summary(alone).drop(columns="service"), equal_nan=True)

    @settings(max_examples=15)
    @given(
        seed=st.integers(0, 1000),
        dispatch=st.sampled_from([lab.RoundRobin(), lab.Random(), lab.LeastWork()]),
        policy=st.sampled_from([lab.DStack, lab.Temporal, lab.Triton, lambda: lab.Temporal(drop_late=True)]),
    )
    def test_every_request_is_served_or_accounted_for_once(self, seed, dispatch, policy):
        trace = lab.simulate_cluster(PLACED, policy, 500, seed, dispatch)
        requests, launches = trace.requests, trace.launches
        for service, stream in zip(HOT, np.random.SeedSequence(seed).spawn(3), strict=True):
            times = service.arrivals.sample(500, np.random.default_rng(stream))
            mine = requests[requests["service"] == service.name]
            assert np.allclose(mine["arrival_ms"], times, atol=1e-6)
            assert set(mine["gpu"]) <= {r.gpu for r in PLACED.of(service.name)}
        served = requests[requests["outcome"] == "served"]
        assert (served["launch"] >= 0).all()
        assert launches["launch"].is_unique
        joined = served.merge(launches, on="launch", suffixes=("", "_of_launch"))
        assert len(joined) == len(served) == launches["batch"].sum()
        assert (joined["gpu"].astype(str) == joined["gpu_of_launch"].astype(str)).all()
        assert (joined["service"].astype(str) == joined["service_of_launch"].astype(str)).all()
        assert np.array_equal(joined["finish_ms"], joined["end_ms"])
        assert served.groupby("launch").size().to_dict() == launches.set_index("launch")["batch"].to_dict()

    def test_the_merged_summary(self):
        trace = lab.simulate_cluster(PLACED, lab.DStack, 2000, seed=1)
        merged = trace.merged()
        table = lab.summary(merged).set_index("service")
        each = [lab.summary(t).set_index("service") for t in trace.traces.values()]
        assert table.index.tolist() == ["a", "b", "c", "all"]
        for column in ("throughput_rps", "goodput_rps", "dropped"):
            assert table.loc["all", column] == pytest.approx(sum(t.loc["all", column] for t in each))
        busy = [t.loc["all", "utilization"] for t in each]
        assert len(busy) == 3
        assert table.loc["all", "utilization"] == pytest.approx(np.mean(busy))
        assert merged.provenance.kind == "simulated"
        assert "cluster of 2 x toy GPU + 1 x toy GPU" in str(merged.provenance)
        assert "GPU% of the 3 GPUs together" in merged.provenance.marks
        assert merged.services["rate_rps"].tolist() == [s.rate_rps for s in HOT]
        assert table.loc["all", "slo_attainment"] > 0.95

    def test_the_merged_trace_is_saved_like_any(self, tmp_path):
        merged = lab.simulate_cluster(PLACED, None, 300, seed=1).merged()
        again = lab.load_trace(merged.save(tmp_path / "cluster"))
        assert lab.summary(again)["goodput_rps"].tolist() == lab.summary(merged)["goodput_rps"].tolist()
        assert again.launches["gpu"].astype(str).tolist() == merged.launches["gpu"].astype(str).tolist()

    def test_the_same_requests_whatever_the_placement(self):
        other = lab.place(HOT, lab.Cluster(gpus=4, profile=SLOW), "temporal")
        one, two = (lab.simulate_cluster(p, None, 500, seed=4).requests for p in (PLACED, other))
        assert one["arrival_ms"].tolist() == two["arrival_ms"].tolist()
        assert one["gpu"].tolist() != two["gpu"].tolist()

    def test_goodput_keeps_the_bound(self):
        trace = lab.simulate_cluster(PLACED, lab.DStack, 2000, seed=1)
        came = trace.requests["service"].value_counts()
        arrived = [replace(s, arrivals=lab.Deterministic(came[s.name] / 2)) for s in HOT]
        limit = lab.cluster_bound(arrived, PLACED.cluster).total_rps
        assert lab.summary(trace.merged())["goodput_rps"].iloc[-1] <= limit * (1 + 1e-9)

    def test_a_policy_or_what_makes_one(self):
        traces = [
            lab.simulate_cluster(PLACED, p, 300, 2).merged() for p in (None, lab.DStack, lab.DStack(), lambda: lab.DStack())
        ]
        assert all(t.launches.equals(traces[0].launches) for t in traces)
        assert traces[0].policy == "DStack"
        alone = lab.place(services(a=20), lab.Cluster(gpus=2, profile=SLOW), "exclusive")
        assert lab.simulate_cluster(alone, None, 300).merged().policy == "Temporal"

    def test_scatter_is_of_each_gpu(self):
        twins = lab.place(services(a=1000), lab.Cluster(gpus=2, profile=SLOW))
        trace = lab.simulate_cluster(twins, None, 500, 1, variability=lab.Lognormal(cv=0.3))
        first, second = (t.launches["end_ms"] - t.launches["start_ms"] for t in trace.traces.values())
        assert not np.allclose(first[:20], second[:20])
        assert {t.seed for t in trace.traces.values()} == {1}

    def test_a_replica_that_is_sent_nothing(self):
        trace = lab.simulate_cluster(PLACED, None, 0.001, seed=1)
        assert len(trace.requests) == 0
        assert np.isnan(lab.summary(trace.merged())["slo_attainment"].iloc[-1])

    def test_errors_name_the_gpu(self):
        with pytest.raises(lab.PolicyError, match=r"gpu0: .*Greedy") as caught:
            lab.simulate_cluster(PLACED, Greedy, 300)
        assert isinstance(caught.value.trace, lab.Trace)
        temporal = lab.place(lab.scaled(HOT, 1.1), lab.Cluster(gpus=3, profile=SLOW), "temporal")
        crowded = {
            gpu: replace(plan, allocations=tuple(replace(a, rate_rps=20 * a.rate_rps) for a in plan.allocations))
            for gpu, plan in temporal.plans.items()
        }
        with pytest.raises(lab.InfeasiblePlan, match="gpu0: no slots"):
            lab.simulate_cluster(replace(temporal, plans=crowded), lab.DStack, 300)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"placement": 1}, "placement = 'int'"),
            ({"duration_ms": 0}, "duration_ms = 0"),
            ({"seed": -1}, "seed = -1"),
            ({"dispatch": "random"}, "dispatch = 'random'"),
            ({"dispatch": lab.Random}, "dispatch = "),
            ({"policy": lambda: 5}, "policy = 5"),
        ],
    )
    def test_bad_input(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            lab.simulate_cluster(**{"placement": PLACED, "policy": None, "duration_ms": 100, **wrong})

    def test_a_dispatcher_of_ones_own_is_checked(self):
        class Lost:
            def assign(self, times_ms, rates_rps, full_rps, rng):
                return np.full(len(times_ms), len(rates_rps))

        with pytest.raises(ValueError, match="replicas chosen by dispatch"):
            lab.simulate_cluster(PLACED, None, 300, dispatch=Lost())


def test_provenance_of_the_toy():
    assert str(SIMULATED) in str(lab.simulate_cluster(PLACED, None, 100).traces["gpu0"].provenance)


def test_what_no_placement_holds_is_planned_in_part_and_the_rest_dropped():
    """Twice what two GPUs serve: refused, or a part planned; every request of the whole rate still comes."""
    profile = lab.load_profile("v100-simulated")
    cluster = lab.Cluster(gpus=2, profile=profile)
    mix = lab.workload("C-2", profile, load=1)
    asked = lab.scaled(mix, 2 / lab.cluster_bound(mix, cluster).load)
    with pytest.raises(lab.InfeasiblePlan, match="no dstack placement"):
        lab.place(asked, cluster)
    placed = lab.place(asked, cluster, overload="reject")
    assert 0 < placed.planned <= 0.5  # the bound forbids more
    assert placed.services == asked
    trace = lab.simulate_cluster(placed, None, 2000, seed=1)
    came = lab.simulate_cluster(lab.place(lab.scaled(asked, 0.2), cluster), None, 2000, seed=1)
    assert len(trace.requests) == pytest.approx(5 * len(came.requests), rel=0.1)
    assert lab.summary(trace.merged())["dropped"].iloc[-1] > 0
    easy = lab.scaled(asked, 0.2)
    assert lab.place(easy, cluster, overload="reject").planned == 1
    with pytest.raises(ValueError, match="overload = 'drop'"):
        lab.place(easy, cluster, overload="drop")

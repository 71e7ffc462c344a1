"""Slots of plans that know that launches slow each other down: the slowdown by hand, and what knowing it is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_builders import takes

import dstack_lab as lab
from dstack_lab.contention import Contention
from dstack_lab.metrics import gpu_time
from dstack_lab.policies.slot_plan import _Planner, cut_slots
from dstack_lab.policies.slots import SlotKeeper
from dstack_lab.recipes import plan_of, recipe_of
from dstack_lab.trials import plan_for

SHARES = tuple(10.0 * k for k in range(1, 11))


def knowing(made: lab.Plan, *constants: float) -> lab.Plan:
    return replace(made, contention=Contention(*constants))


@pytest.fixture(scope="module")
def known():
    return lab.load_profile("v100-simulated")


class TestSlowdown:
    @pytest.fixture
    def both(self):
        """1 ms and 16 ms long, whatever the share."""
        points = [("short", 40, lab.Poisson(500), 50.0, 1, takes(1)), ("long", 80, lab.Poisson(30), 50.0, 1, takes(16))]
        return knowing(plan(*points, shares=SHARES))

    def test_by_hand(self, both):
        """Each beside as many of the longest as fit: one in two slots, nine in ten; nobody in one."""
        planner = _Planner(both, True, None)
        short, long = 0.096 * 16**0.1, 0.096
        assert planner.slots(1, 0.0).slowdown == (1, 1)
        assert planner.slots(2, 0.0).slowdown == pytest.approx((1 + short, 1 + long), abs=0.005)
        assert planner.slots(10, 0.0).slowdown == pytest.approx((1 + 9 * short, 1 + 9 * long), abs=0.005)

    def test_of_the_batch_that_two_in_a_row_are_in_time_with(self):
        """4 ms and 2 more a request, SLO 32: 6 are in time twice, 16 ms; the other takes 1 ms."""
        points = [("large", 32, lab.Poisson(50), 50.0, 1, takes(4, 2, 16)), ("small", 32, lab.Poisson(50), 50.0, 1, takes(1))]
        made = knowing(plan(*points, shares=SHARES))
        slots = _Planner(made, True, None).slots(2, 0.0)
        large, small = slots.slowdown
        assert (slots.gpu_pct, slots.copies) == ((50, 50), (2, 2))
        assert (large, small) == (pytest.approx(1 + 0.096, abs=0.005), pytest.approx(1 + 0.096 * 16**0.1, abs=0.005))

    def test_it_is_what_the_run_and_the_trial_expect(self, both):
        slots = _Planner(both, True, None).slots(2, 0.0)
        keeper = SlotKeeper(both, slots, drop=True)
        assert keeper.times == [[0, slots.slowdown[0]], [0, 16 * slots.slowdown[1]]]
        late = {}
        for slow in (1.0, 2.0, 5.1):  # 5.1 · 16 ms are more than 80
            late[slow] = _Planner(both, True, None).late(replace(slots, slowdown=(1.0, slow)), 1.0)[0][1]
        assert late[1.0] <= late[2.0] < late[5.1] == 1

    def test_nobody_feels_anybody_whom_no_plan_tells_of_it(self, both):
        for told in (None, Contention(0)):
            assert _Planner(replace(both, contention=told), True, None).slots(10, 0.0).slowdown == (1, 1)


class TestPlans:
    def test_the_more_they_cost_each_other_the_fewer_slots(self):
        small = plan(*[(n, 60, lab.Poisson(150), 25.0, 8, table(4, 1, 30, 16)) for n in "abcd"], shares=SHARES)
        counts = [cut_slots(knowing(small, c)).count for c in (0.001, 0.1, 3.0)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > 2 > counts[-1] == 1

    def test_networks_that_fill_the_gpu_take_turns_undisturbed(self):
        full = plan(*[(n, 60, lab.Poisson(120), 50.0, 8, table(2, 1, 100, 16)) for n in "abc"], shares=SHARES)
        slots = cut_slots(knowing(full, 0.3))
        assert (slots.gpu_pct, slots.slowdown) == ((100,) * 3, (1,) * 3)

    def test_no_plan_says_that_they_slow_each_other_down(self):
        many = plan(*[(n, 50, lab.Poisson(2000), 50.0, 8, table(1, 0.5, 80)) for n in "ab"], shares=SHARES)
        with pytest.raises(lab.InfeasiblePlan, match="slowed down as they are beside each other: a at 2000/s within 50 ms"):
            cut_slots(knowing(many), drop=False)
        assert min(cut_slots(knowing(many)).late) > 0.1

    @settings(max_examples=15, deadline=None)
    @given(
        rates=st.lists(st.floats(0.5, 800), min_size=1, max_size=5),
        slowdown=st.floats(0.001, 1),
        drop=st.booleans(),
        knee=st.floats(10, 100),
    )
    def test_whatever_they_cost_slots_fit_the_gpu(self, rates, slowdown, drop, knee):
        points = [(f"s{i}", 50, lab.Poisson(r), 50.0, 4, table(1, 0.5, knee, 8)) for i, r in enumerate(rates)]
        try:
            slots = cut_slots(knowing(plan(*points, shares=SHARES), slowdown), drop)
        except lab.InfeasiblePlan:
            assert not drop
            return
        assert slots.count * min(slots.gpu_pct) <= 100 + 1e-6
        assert all(s >= 1 for s in slots.slowdown)
        assert (slots.count == 1) == (max(slots.slowdown) == 1) or slowdown < 0.01
        assert drop or max(slots.late) <= 0.05

    def test_contention_without_effect_changes_nothing(self, known):
        services = lab.workload("C-3", known, 0.7)
        plain, told = (lab.optimize(services, known, contention=c) for c in (None, Contention(slowdown=0)))
        one, other = (lab.simulate(p, lab.DStack(), 2000, seed=1) for p in (plain, told))
        assert other.launches.equals(one.launches)
        assert other.requests.equals(one.requests)

    def test_service_times_of_a_plan_stay_those_alone(self, known):
        """What is true of the GPU is applied by whoever runs the plan, once."""
        services = lab.workload("C-2", known, 0.5)
        made = lab.optimize(services, known, contention=Contention())
        assert made.allocations == lab.optimize(services, known).allocations
        with pytest.raises(ValueError, match="contention = 1"):
            replace(made, contention=1)

    def test_a_recipe_keeps_it(self, known):
        made = lab.optimize(lab.workload("C-2", known, 0.5), known, contention=Contention(0.05, 0.2))
        recipe = recipe_of(made, lab.DStack())
        assert plan_of(recipe, made.services).contention == Contention(0.05, 0.2)
        old = {k: v for k, v in recipe.items() if k != "contention"}
        assert plan_of(old, made.services).contention is None


class TestRuns:
    def test_a_run_costs_what_the_plan_expects_unless_told_otherwise(self, known):
        told = plan_for(lab.workload("C-4", known, 0.65), known, "efficacy", None, Contention())
        runs = (lab.simulate(told, lab.DStack(reject=True), 1000, 1, contention=c) for c in (None, Contention(), Contention(0)))
        default, same, free = (run.launches for run in runs)
        assert default.equals(same)

        def alone(launches):
            rows = zip(launches["service"].cat.codes, launches["batch"], launches["gpu_pct"], strict=True)
            return np.array([told.tables[i].at(b, g) for i, b, g in rows])

        took = [(run["end_ms"] - run["start_ms"]).to_numpy() for run in (free, same)]
        assert took[0] == pytest.approx(alone(free), abs=1e-5)
        assert took[1].sum() > 1.02 * alone(same).sum()

    def test_it_is_not_compiled_and_says_so(self, known, monkeypatch):
        monkeypatch.setattr("dstack_lab.compiled.MANY", 100)
        monkeypatch.setattr("dstack_lab.compiled.obstacle", lambda policy: "")
        made = lab.optimize(lab.workload("C-2", known, 0.5), known, contention=Contention())
        marks = lab.simulate(made, lab.DStack(), 1000).provenance.marks
        assert "python engine: service times scatter or launches slow each other" in marks

    @pytest.mark.parametrize("pool", [True, False])
    def test_it_follows_slots_even_if_told_not_to_pool(self, known, pool):
        """Windows do not know that launches slow each other down."""
        made = plan_for(lab.workload("C-4", known, 0.65), known, "efficacy", None, Contention())
        policy = lab.DStack(reject=True, pool=pool)
        used = lab.simulate(made, policy, 500).launches.groupby("service", observed=True)["gpu_pct"].unique()
        slots = cut_slots(made, drop=True)
        assert policy.copies(made) == max(slots.copies)
        for name, share in zip(slots.services, slots.gpu_pct, strict=True):
            assert policy.shares(made)[name] == (share,) == tuple(used[name])


def raced(profile: lab.Profile, name: str, loads: tuple[float, ...], duration_ms: float, **policies: lab.policies.Policy):
    """Part of the requests in time: of all, and of the service that suffers most, by load and policy."""
    same = {"contention": Contention(), "admission": "one rule", "jobs": 1}
    table = lab.compare(lab.workload(name, profile, 1.0), profile, policies, loads, (1, 2), duration_ms, **same)
    every = table[table["service"] == "all"].pivot(index="load", columns="policy", values="slo_attainment")
    return every, table[table["service"] != "all"].groupby(["load", "policy"], observed=True)["slo_attainment"].min().unstack()


@pytest.mark.parametrize(
    ("profile", "name", "fewer"),
    [
        ("v100-simulated", "C-2", 0),
        ("v100-simulated", "C-4", 0),
        ("v100-simulated", "C-7", 0.07),  # seven in two slots: turns answer more in all, and one of the seven hardly ever
        ("h200-simulated", "C-4", 0),
    ],
)
def test_told_of_contention_it_serves_no_less_than_turns_do(profile, name, fewer):
    """Under one rule, with real contention, beside Temporal, which nobody disturbs; who suffers most suffers less."""
    loads, duration_ms = ((0.65, 0.8), 2000) if profile.startswith("v100") else ((0.8, 0.95), 500)
    every, worst = raced(lab.load_profile(profile), name, loads, duration_ms, slots=lab.DStack(), turns=lab.Temporal())
    assert (every["slots"] >= every["turns"] - fewer - 0.002).all(), every
    assert (worst["slots"] >= worst["turns"] - 0.002).all(), worst
    assert worst["slots"].iloc[-1] > worst["turns"].iloc[-1] + 0.05, worst


def test_not_told_it_believes_times_that_do_not_hold(known):
    same = {"seeds": (1, 2), "duration_ms": 3000, "contention": Contention(), "admission": "one rule"}
    asked = lab.workload("C-4", known, 1.0)
    told, untold = (lab.compare(asked, known, [lab.DStack()], (0.65,), told=told, **same) for told in (True, False))
    gain = [t.loc[t["service"] == "all", "slo_attainment"].item() for t in (told, untold)]
    assert gain[0] > gain[1] + 0.1


@pytest.mark.parametrize(("profile", "name"), [("v100-simulated", "C-3"), ("v100-simulated", "C-7"), ("h200-simulated", "C-4")])
@pytest.mark.parametrize("load", [1.5, 3.0])
def test_beyond_the_bound_the_gpu_is_shared_fairly(profile, name, load):
    """Every service alone asks for more than its equal part: nobody starves, and GPU time is shared evenly."""
    profile = lab.load_profile(profile)
    made = plan_for(lab.workload(name, profile, load), profile, "efficacy", None, Contention())
    trace = lab.simulate(made, lab.DStack(reject=True), 3000 if name != "C-4" else 800, seed=2)
    attained = lab.summary(trace).set_index("service")["slo_attainment"]
    assert lab.jain(gpu_time(trace)) >= 0.95
    assert (attained * load >= 0.5).all(), attained

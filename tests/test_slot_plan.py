"""Into how many slots a GPU is cut: beside all ways there are, and at the edges of what may be asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import plan, table
from slot_builders import check_never_idle, takes

import dstack_lab as lab
from dstack_lab.policies import slot_plan
from dstack_lab.policies.slot_plan import BEST, IN_ALL, MOST_SLOTS, PERIODS, ROOMS, WAITS, WORTHS, _cut, _Planner, cut_slots
from dstack_lab.services import ServiceTable

SHARES = tuple(10.0 * k for k in range(1, 11))


def asks(*points: tuple[float, float, ServiceTable], shares: tuple[float, ...] = SHARES) -> lab.Plan:
    """Plan from (SLO, rate, service times); a batch is full with 4, or as many as there may be."""
    return plan(
        *[(f"s{i}", slo, lab.Poisson(rate), 50.0, min(4, times.batch_max), times) for i, (slo, rate, times) in enumerate(points)],
        shares=shares,
    )


@pytest.fixture
def trials(monkeypatch):
    """Requests of each trial, from now on."""
    seen = []

    def noted(riders, *rest):
        seen.append(sum(len(r.arrivals_ms) for r in riders))
        return slot_trial(riders, *rest)

    slot_trial = slot_plan.late_in_slots
    monkeypatch.setattr(slot_plan, "late_in_slots", noted)
    return seen


class TestChoice:
    @pytest.mark.parametrize("seed", range(8))
    def test_beside_brute_force(self, seed):
        """Of every number of slots with every room, wait and rule of giving up, none does much better on the whole draw."""
        rng = np.random.default_rng(seed)
        made = asks(
            *[
                (
                    float(rng.integers(20, 100)),
                    rng.uniform(50, 800),
                    table(rng.uniform(0.5, 3), rng.uniform(0.2, 1.5), rng.uniform(20, 100)),
                )
                for _ in range(int(rng.integers(1, 4)))
            ]
        )
        planner = _Planner(made, True, None)
        counts = [one for n in range(1, MOST_SLOTS + 1) if (one := planner.slots(n, 0.0)) is not None]
        pains = [
            planner.pain(replace(one, greedy_pct=room, wait_part=wait, worth=worth), 1.0)
            for one in {one.gpu_pct: one for one in counts}.values()
            for room in planner.rooms
            for wait in WAITS
            for worth in WORTHS
        ]
        slots = cut_slots(made)
        found = planner.pain(slots, 1.0)
        assert found == min(planner.pain(replace(slots, worth=worth), 1.0) for worth in WORTHS)
        assert min(pains) <= found <= min(pains) + 0.002
        assert max(pains) > min(pains)

    def test_pain_by_hand(self):
        """A modest service loses 10 %; a greedy one 70 %, of which a fair share of the GPU could serve no 50 %."""
        planner = _Planner(asks((50, 100, takes(1)), (50, 300, takes(1))), True, None)
        slots = planner.slots(1, 0.0)
        planner.late = lambda slots, part: ((0.1, 0.7), 0.5)
        planner.parts = [1.0, 0.5]
        assert planner.pain(slots, 1.0) == pytest.approx(0.1 + 0.2 + (100 * 0.1 + 300 * 0.7) / 400 + 0.003 * 0.5)
        planner.parts = [1.0, 1.0]
        assert planner.pain(slots, 1.0) == pytest.approx(0.7 + (100 * 0.1 + 300 * 0.7) / 400 + 0.003 * 0.5)

    def test_small_networks_side_by_side_large_ones_in_turn(self):
        """Four that cannot use more than 20 % gain by slots of at most that; two that fill the GPU lose by any cut."""
        small, large = asks(*[(40, 350, table(2, 1, 20))] * 4), asks(*[(40, 200, table(2, 1, 100))] * 2)
        assert max(cut_slots(small).gpu_pct) <= 20
        assert cut_slots(large).gpu_pct == (100, 100)

    def test_the_same_whenever_it_is_asked_and_thought_through_once(self, trials):
        made = asks((40, 300, table(2, 1, 40)), (60, 100, table(3, 1, 60)))
        first, tried = cut_slots(made), len(trials)
        assert cut_slots(made) is first
        assert len(trials) == tried > MOST_SLOTS / 2
        assert cut_slots(replace(made)) == first  # another plan, of the same
        assert len(trials) == 2 * tried

    def test_plans_for_rates_of_the_hour_push_no_others_out(self):
        made = asks((40, 300, table(2, 1, 40)))
        first = cut_slots(made)
        kept = _cut.cache_info().currsize
        assert cut_slots(made, rates_rps=(310.0,)).count > 0
        assert _cut.cache_info().currsize == kept
        assert cut_slots(made) is first

    def test_rates_may_be_others_than_the_plans(self):
        made, more = (asks((40, rate, table(2, 1, 40)), (60, 100, table(3, 1, 60))) for rate in (100, 1800))
        assert cut_slots(made, rates_rps=(1800.0, 100.0)) == cut_slots(more) != cut_slots(made)

    def test_with_drop_all_is_planned_for_without_only_what_the_plan_promises(self):
        """A plan that was sized for a tenth of what comes."""
        made = asks((40, 3000, table(2, 1, 40)))
        sized = replace(made, allocations=(replace(made.allocations[0], rate_rps=300.0),))
        assert cut_slots(sized, drop=True).late[0] > 0.2
        assert cut_slots(sized, drop=False).late[0] < 0.05
        assert _Planner(sized, True, None).rates == (3000,)
        assert _Planner(sized, False, None).rates == (300,)

    @pytest.mark.parametrize("wait_part", [0.0, 0.123, 0.3])
    def test_a_wait_may_be_given(self, wait_part):
        assert cut_slots(asks((40, 300, table(2, 1, 40))), wait_part=wait_part).wait_part == wait_part

    def test_engines_are_told_how_long_to_wait(self, monkeypatch):
        monkeypatch.setattr(slot_plan, "WAITS", (0.2,))
        made, policy = asks((40, 300, table(2, 1, 40))), lab.DStack()
        policy.reset(made)
        assert policy.wait_ms(made.allocations[0], 40) == 0.2 * 40

    def test_what_it_says_of_its_trial(self):
        made = asks((40, 600, table(2, 1, 80)), (60, 300, table(3, 1, 60)))
        slots = cut_slots(made)
        assert slots.late == _Planner(made, True, None).late(slots, 1.0)[0]
        frame = slots.to_frame()
        assert frame["services"].tolist() == ["s0", "s1"]
        assert frame["late"].tolist() == list(slots.late)
        assert set(frame["count"]) == {slots.count}


class TestEdges:
    def test_no_plan_says_who_asks_for_what(self):
        words = r"no slots hold these services: s0 at 2000/s within 50 ms, s1 at 1500/s within 40 ms; lower a rate"
        with pytest.raises(lab.InfeasiblePlan, match=words):
            cut_slots(asks((50, 2000, table(1, 0.5, 80)), (40, 1500, table(1, 0.5, 80))), drop=False)

    def test_a_plan_of_which_a_third_is_late_is_none(self):
        """At 2140/s nobody is late in the trial, at 2200/s 35 %, though the bound still holds."""
        within, beyond = (asks((40, rate, table(1, 0.5, 80))) for rate in (2140, 2200))
        assert cut_slots(within, drop=False).late == (0,)
        with pytest.raises(lab.InfeasiblePlan, match="s0 at 2200/s"):
            cut_slots(beyond, drop=False)

    def test_what_the_first_trials_find_hopeless_gets_no_second(self, monkeypatch):
        parts, late = [], _Planner.late
        monkeypatch.setattr(_Planner, "late", lambda self, slots, part: (parts.append(part), late(self, slots, part))[1])
        busy = asks((50, 2000, table(1, 0.5, 80)), (40, 1500, table(1, 0.5, 80)))
        with pytest.raises(lab.InfeasiblePlan):
            cut_slots(busy, drop=False)
        assert 0.5 not in parts
        cut_slots(busy, drop=True)  # there all ways lose, and the best is still to be found
        assert 0.5 in parts

    def test_an_slo_that_no_share_meets_has_no_plan_either_way(self):
        for drop in (True, False):
            with pytest.raises(lab.InfeasiblePlan, match="s0"):
                cut_slots(asks((5, 10, table(5, 1, 40))), drop=drop)

    def test_a_device_with_one_share(self):
        slots = cut_slots(asks((50, 100, table()), (50, 100, table()), shares=(100.0,)))
        assert (slots.count, slots.gpu_pct, slots.copies) == (1, (100, 100), (1, 1))

    def test_a_narrow_share_alone_still_fills_the_gpu(self):
        """30 % is all that is granted: three slots, however few are asked for."""
        assert cut_slots(asks((50, 100, table()), shares=(30.0,))).count == 3

    def test_who_needs_a_wide_share_gets_it_beside_others_in_slots(self):
        """The last one takes 30 ms at 100 %, and at 60 % or more half its SLO; the others run in slots of a fifth."""
        slots = cut_slots(asks(*[(30, 300, table(1, 0.5, 20))] * 3, (100, 4, takes_wide(30, 60))))
        assert slots.gpu_pct[-1] == 60
        assert slots.count > 2
        assert max(slots.gpu_pct[:3]) <= 100 / slots.count

    def test_a_share_is_wide_enough_if_a_request_takes_half_its_slo(self):
        """600 / share ms, SLO 30: 15 ms at 40 %, where 20 % would do for the whole of it."""
        planner = _Planner(asks((30, 4, table(10, 0, 60, batch_max=1))), True, None)
        assert [planner.slots(count, 0.0).gpu_pct[0] for count in (1, 2, 10)] == [100, 50, 40]

    @pytest.mark.parametrize(("services", "copies"), [(1, 10), (4, 6), (10, 3), (40, 2)])
    def test_one_service_may_use_twice_its_part_of_the_slots_and_one_more(self, services, copies):
        made = asks(*[(50, 10, table(1, 0.5, 10))] * services)
        assert _Planner(made, True, None).slots(10, 0.0).copies == (copies,) * services

    def test_the_whole_slo_if_not_even_all_of_the_gpu_meets_half_of_it(self):
        """30 ms from 60 % up, an SLO of 40: no share takes 20, and 60 % is enough for 40."""
        assert cut_slots(asks((40, 4, takes_wide(30, 60)))).gpu_pct[0] >= 60
        assert _Planner(asks((40, 4, takes_wide(30, 60))), True, None).slots(10, 0.0).gpu_pct == (60,)

    def test_seven_slots_of_a_seventh_never_idle_while_requests_wait(self):
        """Shares that six launches hold, taken from 100 one by one, leave a hair less than the seventh."""
        points = [(f"s{k}", 100, lab.Poisson(70), 100 / 7, 1, table(10, 0.5, 5, batch_max=8)) for k in range(7)]
        made = plan(*points, shares=(100 / 7,))
        trace = lab.simulate(made, lab.DStack(), 1500, seed=1)
        slots = cut_slots(made, drop=False)
        assert slots.count == 7
        assert check_never_idle(trace, 7, slots.copies, slots.wait_part * 100) == 7  # all of them at once

    @pytest.mark.parametrize("services", [32, 33])
    def test_many_services_are_planned_in_finite_work(self, services, trials):
        """As many trials as ways to go on from the best few, each on a draw of bounded length; all are served."""
        slots = cut_slots(asks(*[(60 + i, 20 + i, table(0.4, 0.1, 20, batch_max=8)) for i in range(services)]))
        assert len(trials) <= MOST_SLOTS * len(ROOMS) + BEST * (len(WAITS) + len(WORTHS)) + 1
        assert max(trials) < 1.1 * IN_ALL
        assert max(slots.late) < 0.01

    def test_a_draw_is_neither_endless_nor_empty(self):
        def draws(*points):
            planner = _Planner(asks(*points), True, None)
            return planner.span_ms, [len(a) for a in planner.arrivals]

        fast = (50, 400, table(0.1, 0.01, 20))
        span, (few, many) = draws((50, 200, table(0.1, 0.01, 20)), fast)
        assert span == 3000  # 600 requests of the rarest
        assert (few, many) == (pytest.approx(618, abs=100), pytest.approx(1236, abs=140))
        assert draws((50, 0.01, table()), fast)[0] == PERIODS[1] * 50
        assert draws((2000, 400, table()), fast)[0] == PERIODS[0] * 2000
        span, (_, many) = draws((2000, 0.01, table()), (50, 4000, table(0.01, 0.001, 20)))
        assert span == pytest.approx(1000 * IN_ALL / 4000.01)
        assert many == pytest.approx(1.03 * IN_ALL, rel=0.01)  # what only just holds in one draw is no plan

    @pytest.mark.parametrize("rates", [(0.0, 0.0), (0.0, 300.0)])
    def test_services_that_nobody_asks(self, rates):
        """One of them comes back later, as `AdaptiveDStack` sees it: it still has a share that it can use."""
        slots = cut_slots(asks((40, 300, table(2, 1, 40)), (60, 100, table(3, 1, 60))), rates_rps=rates)
        assert slots.late[0] == 0
        assert min(slots.gpu_pct) >= 10
        assert slots.greedy == (False, False)


class TestBeyondTheBound:
    def test_the_greedy_are_those_who_ask_for_more_than_a_fair_part(self):
        """Demands of 400, 20 and 10 %: the level is 70 %."""
        made = asks(*[(40, rate, takes(10)) for rate in (400, 20, 10)], shares=(100.0,))
        planner = _Planner(made, True, None)
        assert planner.parts == pytest.approx([70 / 400, 1, 1])
        assert planner.rooms == pytest.approx([100, 70, 55, 40, 10])
        assert cut_slots(made).greedy == (True, False, False)

    @pytest.mark.parametrize(("rate", "modest"), [(5000, (20, 150, 100)), (20_000, (20, 300, 50))])
    def test_who_asks_for_far_too_much_still_begins(self, rate, modest):
        """What several times the others' demand leaves may be less than one launch of the greedy holds."""
        slo_ms, rps, knee = modest
        made = asks((40, rate, table(1, 0.5, 100, 8)), *[(slo_ms, rps, table(4, 1, knee, 8))] * 2)
        trace = lab.simulate(made, lab.DStack(reject=True), 1000, seed=1)
        assert (trace.requests["outcome"] != "unserved").all()
        assert (trace.requests["outcome"][trace.requests["service"] == "s0"] == "served").sum() > 50


def takes_wide(ms: float, share: float) -> ServiceTable:
    """One request a batch: `ms` from that share up, a hundred times as long below."""
    return ServiceTable(np.where(np.arange(1, 101) < share, 100 * ms, ms)[None, :])


@pytest.mark.parametrize(("workload", "load", "gain"), [("C-4", 0.8, 0.03), ("C-7", 0.6, 0.05)])
def test_pooling_is_worth_it(workload, load, gain):
    """Where services keep lanes of their own some of them fail, and slots for all hold the load."""
    profile = lab.load_profile("v100-simulated")
    kinds = {"slots": lab.DStack(reject=True), "lanes": lab.DStack(reject=True, pool=False)}
    services = lab.workload(workload, profile, load=1)
    table = lab.compare(services, profile, kinds, (load,), seeds=(1, 2), duration_ms=3000, baseline="lanes", jobs=1)
    worst = table[table["service"] != "all"].groupby("policy", observed=True)["slo_attainment"].min()
    assert worst["slots"] > worst["lanes"] + gain, worst

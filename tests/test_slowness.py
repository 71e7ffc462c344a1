"""What launches cost each other, learnt on line: by hand, against the constants of a run, and what a policy makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from builders import plan, table

import dstack_lab as lab
from dstack_lab.contention import Contention
from dstack_lab.policies import AdaptiveDStack, DStack, Launch, Running
from dstack_lab.policies.slot_plan import cut_slots
from dstack_lab.policies.slowness import PRIOR_EACH, SlownessWatch
from dstack_lab.trials import plan_for
from dstack_lab.variability import Variability


class Watching(DStack):
    """D-STACK that does nothing with what it learns."""

    def reset(self, plan):
        super().reset(plan)
        self.watch = SlownessWatch()

    def decide(self, state):
        self.watch.look(state)
        decisions = super().decide(state)
        self.watch.launched(state, decisions)
        return decisions


def c4(load: float) -> lab.Plan:
    known = lab.load_profile("v100-simulated")
    return plan_for(lab.workload("C-4", known, load), known, "efficacy")


@dataclass(frozen=True)
class Slower(Variability):
    """Every launch takes this many times as long as predicted."""

    factor: float

    def sample(self, count, rng):
        return np.full(count, self.factor)


@pytest.mark.parametrize("slowdown", [0.0, 0.096, 0.2])
def test_the_constant_of_a_run_is_found(slowdown):
    policy = Watching(reject=True)
    lab.simulate(c4(0.5), policy, 1000, 1, contention=Contention(slowdown))
    assert policy.watch.slowdown == pytest.approx(slowdown, abs=0.005)
    assert all(f == pytest.approx(1, abs=0.01) for f in policy.watch.factors(policy.watch.slowdown).values())


def test_it_is_told_apart_from_wrong_predictions():
    """All launches take 1.3 times as long as predicted, and 0.1 more of that for each other one."""
    policy = Watching(reject=True)
    lab.simulate(c4(0.4), policy, 12_000, 1, Slower(1.3), Contention(0.1))
    assert policy.watch.slowdown == pytest.approx(0.13, abs=0.02)
    assert all(1.15 < f < 1.35 for f in policy.watch.factors(policy.watch.slowdown).values())


def test_scatter_is_not_taken_for_it():
    policy = Watching(reject=True)
    lab.simulate(c4(0.5), policy, 12_000, 1, lab.Lognormal(0.3))
    assert policy.watch.slowdown < 0.04


class FakeView:
    def __init__(self, ms: float) -> None:
        self.ms = ms

    def service_ms(self, batch, share):
        return self.ms


class FakeState(dict):
    now_ms = 0.0

    def __init__(self, **views):
        super().__init__(views)
        self.running = []


def steps(watch: SlownessWatch, state: FakeState):
    """Make a function that moves the clock: a launch, by its place in the order of begins, ends; one of a service begins."""

    def at(now, ended=None, began=""):
        state.now_ms = now
        if ended is not None:
            state.running[ended] = None
        shown, state.running = state.running, [one for one in state.running if one]
        watch.look(state)
        state.running = shown
        watch.launched(state, [Launch(began, 50, 1)] if began else [])
        if began:
            state.running.append(Running(began, 50, 1, now, now + state[began].ms))

    return at


def test_others_count_for_as_long_as_they_run():
    """a runs from 0 to 12 instead of 10; b of the same length beside it from 6 on: half an other."""
    watch, state = SlownessWatch(), FakeState(a=FakeView(10.0), b=FakeView(10.0))
    at = steps(watch, state)
    at(0, began="a")
    at(6, began="b")
    at(12, ended=0)
    assert watch.factors(0.4)["a"] == pytest.approx((1.2 + PRIOR_EACH) / (1 + 0.4 * 0.5 + PRIOR_EACH))
    assert watch.slowdown is None  # one launch says nothing
    at(18, ended=1)
    assert watch.factors(0.0)["b"] == pytest.approx((1.2 + PRIOR_EACH) / (1 + PRIOR_EACH))
    watch.forget(1.0)
    assert watch.factors(0.4) == pytest.approx({"a": 1, "b": 1})


def test_of_two_launches_of_one_service_the_right_one_has_ended():
    """The first takes 12 instead of 10, the second, which ends before it, just the 4 it was predicted to."""
    watch, state = SlownessWatch(exponent=0), FakeState(a=FakeView(10.0))
    at = steps(watch, state)
    at(0, began="a")
    state["a"].ms = 4.0
    at(6, began="a")
    at(10, ended=1)
    assert watch.factors(0.5)["a"] == pytest.approx((1 + PRIOR_EACH) / (1 + 0.5 + PRIOR_EACH))
    at(12, ended=0)
    assert watch.factors(0.5)["a"] == pytest.approx((1 + 1.2 + PRIOR_EACH) / (2 + 0.5 * (1 + 4 / 12) + PRIOR_EACH))


def test_of_launches_alone_nothing_is_learnt_about_others():
    policy = Watching(pool=False)  # one at a time
    lab.simulate(plan(("a", 50, lab.Poisson(200), 50.0, 4, table()), shares=(50.0, 100.0)), policy, 2000, contention=Contention())
    assert policy.watch.enough
    assert policy.watch.slowdown is None


class TestAdaptive:
    def test_it_finds_out_and_cuts_the_gpu_anew(self):
        """Not told, it does nearly as well as one that is, and far better than one that believes what it was told."""
        made = c4(0.65)
        policies = {"learns": AdaptiveDStack(), "believes": AdaptiveDStack(learns=False)}
        told = plan_for(made.services, lab.load_profile("v100-simulated"), "efficacy", None, Contention())
        good = {
            name: lab.summary(lab.simulate(made, policy, 4000, 1, contention=Contention()))["slo_attainment"].iloc[-1]
            for name, policy in policies.items()
        }
        best = lab.summary(lab.simulate(told, DStack(reject=True), 4000, 1))["slo_attainment"].iloc[-1]
        assert policies["learns"].contention.slowdown == pytest.approx(0.096, abs=0.01)
        assert good["learns"] > good["believes"] + 0.2
        assert good["learns"] > best - 0.04

    def test_where_nobody_is_felt_it_changes_nothing(self):
        made = c4(0.65)
        one, other = (lab.simulate(made, AdaptiveDStack(learns=learns), 2000, seed=1) for learns in (True, False))
        assert one.launches.equals(other.launches)

    def test_told_too_much_it_goes_back_to_more_slots(self):
        known = lab.load_profile("v100-simulated")
        wary = plan_for(lab.workload("C-4", known, 0.5), known, "efficacy", None, Contention(0.15))
        policy = AdaptiveDStack()
        lab.simulate(wary, policy, 3000, 1, contention=Contention(0))
        assert policy.contention.slowdown < 0.04
        assert policy.keeper.slots.count > cut_slots(wary, True).count

    def test_wrong_predictions_are_corrected(self):
        made = c4(0.4)
        policy = AdaptiveDStack()
        lab.simulate(made, policy, 6000, 1, Slower(1.3))
        _, others, *_ = policy.watch._sums / policy.watch._sums[0]  # hardly different from launch to launch
        assert policy.contention.slowdown < 0.08
        took = [f * (1 + policy.contention.slowdown * others) for f in policy.factors.values()]
        assert all(1.1 < f < 1.35 for f in took)  # those of rare services lean to 1
        assert len(policy.factors) == 4

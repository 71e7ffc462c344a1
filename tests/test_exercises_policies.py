"""Exercises on schedules, races, policies and clusters: right answers of any kind pass, and each mistake has its hint."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

import dstack_lab as lab
from dstack_lab import exercises
from dstack_lab.exercises.referee import as_policy, foresees
from dstack_lab.exercises.schedules import FAULTS, faults
from dstack_lab.policies import PeriodPlan, Window
from dstack_lab.services import Allocation

SEEDS, SHORT_MS = (3, 4, 5), 800.0
SHORT = {"seeds": SEEDS, "duration_ms": SHORT_MS}


@pytest.fixture(scope="module")
def profile():
    return lab.load_profile("v100-simulated")


@pytest.fixture(scope="module")
def light(profile):
    return lab.workload("C-2", profile, load=0.4)


@pytest.fixture(scope="module")
def heavy(profile):
    return lab.workload("C-4", profile, load=0.8)


@pytest.fixture(scope="module")
def too_much(profile):
    return lab.workload("C-3", profile, load=1.2)


@pytest.fixture(scope="module")
def plan(light, profile):
    return lab.optimize(light, profile)


def refused(verdict, *words):
    assert not verdict, verdict
    for word in words:
        assert word in verdict.message, verdict


# ---- schedules ------------------------------------------------------------------------------------------------------


def hand_made(*windows):
    """A period of 100 ms; windows of (service, start, end, share)."""
    made = tuple(Window(start, end, name, share, 1) for name, start, end, share in windows)
    names = dict.fromkeys(w.service for w in made)
    return PeriodPlan(100.0, made, tuple(Allocation(n, 50, 1, 10.0, 10.0) for n in names))


def test_the_worst_latency_is_counted_by_hand():
    period = hand_made(("a", 0, 20, 50), ("a", 30, 50, 50), ("b", 0, 40, 50))
    assert exercises.check_worst_latency(90, period, "a")  # missed the one at 30: next at 100, ends at 120
    assert exercises.check_worst_latency("90 ms", period, "a")
    assert exercises.check_worst_latency(140, period, "b")
    refused(exercises.check_worst_latency(70, period, "a"), "answered when that window ends")
    refused(exercises.check_worst_latency(20, period, "a"), "length of a window")
    refused(exercises.check_worst_latency(50, period, "a"), "start of the one it missed")
    refused(exercises.check_worst_latency(120, period, "a"), "one window in a period")
    refused(exercises.check_worst_latency(..., period, "a"), "no answer yet")
    with pytest.raises(ValueError, match="service = 'c'"):
        exercises.check_worst_latency(90, period, "c")


@pytest.mark.parametrize("name", ["C-2", "C-3", "C-4", "C-7"])
def test_windows_of_the_planner_have_no_fault(name, profile):
    services = lab.workload(name, profile, load=0.5)
    assert faults(lab.plan_period(lab.optimize(services, profile)), services) == set()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 99), st.integers(1, 60), st.sampled_from([30, 50, 60])),
        min_size=1,
        max_size=6,
    )
)
@example([("a", 35, 2, 30), ("a", 46, 1, 30), ("a", 35, 1, 30)])  # two begin at once: the shorter answers
def test_faults_agree_with_a_picture_of_the_period(asked):
    """Oracle: paint every ms of the circle."""
    period = hand_made(*((name, start, start + long, share) for name, start, long, share in asked))
    used = {name for name, *_ in asked}
    held, runs = np.zeros(100), {name: np.zeros(100, int) for name in used}
    for name, start, long, share in asked:
        for ms in range(start, start + long):
            held[ms % 100] += share
            runs[name][ms % 100] += 1
    services = [lab.Service("resnet50", 90, lab.Poisson(1), name) for name in sorted(used)]
    found = faults(period, services)
    assert ("over" in found) == bool((held > 100).any())
    assert ("overlap" in found) == any((line > 1).any() for line in runs.values())
    late = False
    for name in used:
        mine = sorted((s, long) for n, s, long, _ in asked if n == name)
        following = [*mine[1:], (mine[0][0] + 100, mine[0][1])]
        late = late or any(s2 + l2 - s1 > 90 for (s1, _), (s2, l2) in zip(mine, following, strict=True))
    assert ("late" in found) == late


def test_the_puzzle_has_one_fault_of_each_kind():
    cases, services = exercises.period_puzzle()
    found = {name: faults(case, services) for name, case in cases.items()}
    assert sorted(map(sorted, found.values())) == [[], ["late"], ["over"], ["overlap"]]
    right = {name: next(iter(said), "ok") for name, said in found.items()}
    assert exercises.check_broken_periods(right, cases, services)
    assert exercises.check_broken_periods({n: w.upper() for n, w in right.items()}, cases, services)
    for name, word in itertools.product(cases, ["ok", *FAULTS]):
        if word != right[name]:
            refused(exercises.check_broken_periods({**right, name: word}, cases, services), name)
    refused(exercises.check_broken_periods(dict.fromkeys(cases, ...), cases, services), "no answer yet")
    refused(exercises.check_broken_periods({**right, "A": "bad"}, cases, services), "A: the word is one of")
    refused(exercises.check_broken_periods(["ok"] * 3, cases, services), "Give a dict")
    refused(exercises.check_broken_periods(dict.fromkeys(cases, True), cases, services), "A: the word is one of")
    refused(exercises.check_broken_periods(dict.fromkeys(cases, ""), cases, services), "A: the word is one of")


@pytest.mark.parametrize("answer", [["ok", "late", "overlap", "over"], "ok, too late, overlap, over", "ok late overlap over"])
def test_words_may_come_in_the_order_of_the_cases(answer):
    cases, services = exercises.period_puzzle()
    verdict = exercises.check_broken_periods(answer, cases, services)
    assert bool(verdict) == ("too" not in answer)  # five words for four cases
    spoken = {"A": "ok", "B": "too late", "C": "They overlap", "D": "over"}
    assert exercises.check_broken_periods(spoken, cases, services)


@pytest.mark.parametrize(("case", "word"), [("A", "late"), ("A", "over"), ("B", "overlap"), ("D", "overlap")])
def test_a_rule_that_is_kept_is_said_to_be_kept(case, word):
    cases, services = exercises.period_puzzle()
    right = {"A": "ok", "B": "late", "C": "overlap", "D": "over"}
    refused(exercises.check_broken_periods({**right, case: word}, cases, services), FAULTS[word])


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=8))
def test_jain_by_its_formula(amounts):
    truth = sum(amounts) ** 2 / (len(amounts) * sum(a * a for a in amounts))
    assert exercises.check_jain(truth, amounts)
    assert exercises.check_jain(round(truth, 3), dict(enumerate(amounts)))


def test_likely_slips_of_jain_have_their_hints():
    assert exercises.check_jain(0.725, [60, 30, 10])
    refused(exercises.check_jain(100**2 / 4600, [60, 30, 10]), "Divide by 3")
    refused(exercises.check_jain(72.5, [60, 30, 10]), "fraction from 0 to 1")
    refused(exercises.check_jain(1 / 6, [60, 30, 10]), "least over the most")
    refused(exercises.check_jain(3 * 4600 / 100**2, [60, 30, 10]), "Upside down")
    refused(exercises.check_jain(100 / (3 * 4600), [60, 30, 10]), "Square the sum")
    refused(exercises.check_jain(1 - 100**2 / (3 * 4600), [60, 30, 10]), "other way")


# ---- policies: the referee ------------------------------------------------------------------------------------------


class Lanes(lab.Policy):
    """A lane of equal width for each service."""

    def reset(self, plan):
        self.width = max(s for s in plan.shares if s <= 100 / len(plan.services))

    def decide(self, state):
        late = [lab.Drop(s.name, n) for s in state.services if (n := s.late(s.service_ms(s.batch, self.width)))]
        if late:
            return [*late, lab.Wake(state.now_ms)]
        idle = [s for s in state.services if s.ready and not s.in_flight]
        return [lab.Launch(s.name, self.width, s.queued(s.batch)) for s in idle]


class LeastServed(lab.Policy):
    """The whole GPU for whoever received least; another way to be fair."""

    def reset(self, plan):
        self.got = dict.fromkeys((s.name for s in plan.services), 0.0)

    def decide(self, state):
        late = [lab.Drop(s.name, n) for s in state.services if (n := s.late(s.service_ms(s.batch, 100)))]
        if late:
            return [*late, lab.Wake(state.now_ms)]
        ready = [s for s in state.services if s.ready]
        if not ready or state.free_pct < 100:
            return []
        first = min(ready, key=lambda s: self.got[s.name])
        batch = first.queued(first.batch)
        self.got[first.name] += first.service_ms(batch, 100)
        return [lab.Launch(first.name, 100, batch)]


class Lucky(Lanes):
    """Asks for luck without a seed of its own."""

    def decide(self, state):
        return super().decide(state) if np.random.random() < 0.9 else [lab.Wake(state.now_ms + 1)]  # noqa: NPY002


class Raises(lab.Policy):
    def decide(self, state):
        return [lab.Launch(state["bert"].name, 100, 1)]


class NeverLaunches(lab.Policy):
    def decide(self, state):
        return [lab.Wake(state.now_ms + 5)]


class ForgetsReturn(lab.Policy):
    def decide(self, state):
        [lab.Launch(s.name, 100, 1) for s in state.services if s.ready]


class DropsAll(lab.Policy):
    def decide(self, state):
        return [lab.Drop(s.name, s.waiting) for s in state.services if s.waiting]


class DropsMost(Lanes):
    def decide(self, state):
        many = [lab.Drop(s.name, s.waiting - 1) for s in state.services if s.waiting > 1]
        return [*many, lab.Wake(state.now_ms)] if many else super().decide(state)


class TooMuch(lab.Policy):
    def decide(self, state):
        return [lab.Launch(s.name, 80, 1) for s in state.services if s.ready]


class Endless(lab.Policy):
    def decide(self, state):
        return [lab.Wake(state.now_ms)]


class Seer(Lanes):
    """Waits if a request is about to come: reads arrivals that have not happened."""

    def decide(self, state):
        soon = state.now_ns + 5_000_000
        for s in state.services:
            place = s._head + s.waiting
            if s.waiting and state.now_ns < s._arrivals[min(place, len(s._arrivals) - 1)] < soon:
                return [lab.Wake(state.now_ms + 1)]
        return super().decide(state)


class Cheat(lab.Policy):
    """Gives itself another GPU."""

    def decide(self, state):
        state.free_pct = 200.0
        return [lab.Launch(s.name, 100, s.queued(s.batch)) for s in state.services if s.ready and not s.in_flight]


class NoDecide(lab.Policy):
    pass


class BadReset(lab.Policy):
    def reset(self, plan):
        raise KeyError("vgg16")


GOOD = [Lanes, LeastServed, Lucky, lab.DStack, lab.Temporal, lab.MaxMin, lab.Gpulet, lambda: lab.Ideal()]


@pytest.mark.parametrize("make", GOOD)
def test_any_policy_that_works_passes(make, light, profile):
    assert exercises.check_policy(make(), light, profile, **SHORT)


def test_a_class_will_do(light, profile):
    assert exercises.check_policy(Lanes, light, profile, **SHORT)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (..., "no answer yet"),
        ("Lanes", "Give a policy object"),
        (Raises(), "raised at"),
        (NeverLaunches(), "never launches anything"),
        (ForgetsReturn(), "never launches anything"),
        (DropsAll(), "drops requests and launches none"),
        (DropsMost(), "are dropped"),
        (TooMuch(), "broke a rule"),
        (Endless(), "more than 1000 turns"),
        (Seer(), "only the future differs"),
        (Cheat(), "free_pct"),
        (NoDecide(), "no decide of its own"),
        (BadReset(), "before its first decision"),
    ],
)
def test_a_policy_that_fails_gets_its_own_hint(answer, words, light, profile):
    refused(exercises.check_policy(answer, light, profile, **SHORT), words)


def test_a_policy_that_refuses_the_load_does_not_win(too_much, profile):
    refused(exercises.check_policy(lab.DStack(), too_much, profile, **SHORT), "refuses this load")


SHIPPED = [lab.AdaptiveDStack, lab.Clipper, lab.DStack, lab.Gpulet, lab.Gslice, lab.Ideal, lab.MaxMin, lab.MaxThroughput]
SHIPPED += [lab.Nexus, lab.Temporal, lab.Triton, lab.Uncontrolled]


@pytest.mark.parametrize("kind", SHIPPED)
def test_no_policy_of_the_package_knows_the_future(kind, plan):
    assert not foresees(kind(), plan)


def test_a_policy_that_is_drawn_anew_each_time_is_not_called_a_seer(plan):
    class Drawn(Lanes):
        def decide(self, state):
            return super().decide(state) if np.random.default_rng().random() < 0.5 else [lab.Wake(state.now_ms + 1)]

    assert not foresees(Drawn(), plan)
    assert foresees(Seer(), plan)


def test_what_is_no_policy():
    class Needs(lab.Policy):
        def __init__(self, width):
            self.width = width

    refused(as_policy(Needs), "cannot be made without arguments")
    assert isinstance(as_policy(Needs(3)), Needs)


# ---- policies: results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Lanes, lambda: lab.DStack(reject=True), lambda: lab.MaxThroughput(drop_late=True)])
def test_different_ways_to_beat_temporal_pass(make, heavy, profile):
    assert exercises.check_beats(make(), heavy, profile, 1.1, **SHORT)


def test_ratios_are_those_of_the_goodputs(light, profile):
    assert exercises.check_beats(lab.Temporal(drop_late=True), light, profile, 0.99, **SHORT)
    refused(exercises.check_beats(lab.Temporal(drop_late=True), light, profile, 1.01, **SHORT), "1.00 times Temporal's")


def test_a_policy_cannot_beat_itself(heavy, profile):
    rival = lab.DStack(reject=True)
    refused(
        exercises.check_beats(lab.DStack(reject=True), heavy, profile, 1.0, rival=rival, **SHORT), "a draw, as against itself"
    )


def test_a_near_miss_is_not_rounded_to_a_hit(heavy, profile):
    seeds, duration_ms = SHORT["seeds"], SHORT["duration_ms"]
    asked = lab.optimize(heavy, profile, overload="reject")
    mine, theirs = (
        sum(lab.summary(lab.simulate(asked, policy, duration_ms, seed))["goodput_rps"].iloc[-1] for seed in seeds)
        for policy in (lab.DStack(reject=True), lab.Temporal(drop_late=True))
    )
    assert exercises.check_beats(lab.DStack(reject=True), heavy, profile, mine / theirs - 1e-4, **SHORT)
    refused(
        exercises.check_beats(lab.DStack(reject=True), heavy, profile, mine / theirs + 1e-4, **SHORT),
        f"{mine / theirs:.5f} times",
    )


def test_answers_that_come_a_little_late_are_measured(too_much, profile):
    class Hopeful(lab.Policy):
        """Drops nothing: the queue grows, and all are served a little too late."""

        def decide(self, state):
            ready = [s for s in state.services if s.ready and not s.in_flight]
            if not ready or state.free_pct < 100:
                return []
            first = min(ready, key=lambda s: s.oldest_deadline_ms)
            return [lab.Launch(first.name, 100, first.queued(first.batch))]

    refused(exercises.check_beats(Hopeful(), too_much, profile, 3.0, **SHORT), "answered too late, half of those by", "batch")


@pytest.mark.parametrize("make", [Lanes, LeastServed, lambda: lab.DStack(reject=True)])
def test_different_ways_to_be_fair_pass(make, too_much, profile):
    assert exercises.check_fair(make(), too_much, profile, **SHORT)


def test_fair_to_nobody_is_not_fair(too_much, profile):
    refused(exercises.check_fair(lab.MaxThroughput(drop_late=True), too_much, profile, **SHORT), "vgg19 received least")
    refused(exercises.check_fair(lab.MaxMin(), too_much, profile, **SHORT), "It is fair", "goodput is only")


# ---- races ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=12, unique=True))
def test_the_interval_is_that_of_scipy(values):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert exercises.check_interval((high - low) / 2, values)
    assert exercises.check_interval((low, high), values)
    assert exercises.check_interval([high, low], values)


def test_likely_slips_of_an_interval_have_their_hints():
    x = [10.0, 12.0, 11.0, 15.0, 12.0]
    s = np.std(x, ddof=1)
    half = stats.t.ppf(0.975, 4) * s / math.sqrt(5)
    refused(exercises.check_interval(1.96 * s / math.sqrt(5), x), "Student's t with 4")
    refused(exercises.check_interval(s / math.sqrt(5), x), "standard error")
    refused(exercises.check_interval(s, x), "standard deviation")
    refused(exercises.check_interval(2 * half, x), "whole width")
    refused(exercises.check_interval(half * math.sqrt(5), x), "single run")
    refused(exercises.check_interval(half * math.sqrt(4 / 5), x), "n - 1")
    refused(exercises.check_interval(np.mean(x), x), "mean itself")
    refused(exercises.check_interval(stats.t.ppf(0.95, 4) * s / math.sqrt(5), x), "two sides")
    refused(exercises.check_interval(stats.t.ppf(0.975, 5) * s / math.sqrt(5), x), "4 degrees of freedom")
    refused(exercises.check_interval(np.std(x), x), "n - 1 = 4", "single runs")
    refused(exercises.check_interval(np.std(x) / math.sqrt(5), x), "n - 1 = 4", "quantile")
    refused(exercises.check_interval(1.96 * np.std(x) / math.sqrt(5), x), "n - 1 = 4", "many runs")
    refused(exercises.check_interval((min(x), max(x)), x), "worst and the best")
    refused(exercises.check_interval((np.mean(x) + 0.3 - half, np.mean(x) + 0.3 + half), x), "middle")
    refused(exercises.check_interval((10, 11), x), "middle")
    refused(exercises.check_interval((..., ...), x), "no answer yet")
    with pytest.raises(ValueError, match="values"):
        exercises.check_interval(1, [3.0, 3.0])


def test_a_baseline_wins_where_fairness_costs(profile):
    assert exercises.check_baseline_wins((lab.MaxThroughput(), lab.workload("C-4", profile, load=1.05)), profile)


@pytest.mark.parametrize(
    ("policy", "load", "words"),
    [
        (lab.Uncontrolled(), 1.0, "What does D-STACK pay"),
        (lab.Uncontrolled(), 0.3, "nobody can be clearly better"),
        (lab.Temporal(), 4.0, "go nearer to 1"),
        (lab.DStack(), 0.8, "D-STACK itself"),
        (lab.AdaptiveDStack(), 0.8, "D-STACK itself"),
        (DropsAll(), 0.8, "launches none"),
        ("Temporal", 0.8, "policy object"),
    ],
)
def test_no_win_is_explained(policy, load, words, profile):
    refused(exercises.check_baseline_wins((policy, lab.workload("C-4", profile, load=load)), profile, **SHORT), words)


def test_a_race_needs_a_pair_and_services(profile):
    refused(exercises.check_baseline_wins(..., profile), "no answer yet")
    refused(exercises.check_baseline_wins(lab.Temporal(), profile), "Give a pair")
    refused(exercises.check_baseline_wins((lab.workload("C-2", profile), lab.Temporal()), profile), "other way round")
    refused(exercises.check_baseline_wins((lab.Temporal(), ["C-4"]), profile), "list of lab.Service")
    unknown = [lab.Service("bert", 50, lab.Poisson(10))]
    refused(exercises.check_baseline_wins((lab.Temporal(), unknown), profile), "does not know bert")
    twins = [lab.Service("vgg19", 100, lab.Poisson(10))] * 2
    refused(exercises.check_baseline_wins((lab.Temporal(), twins), profile), "same name")


# ---- simulation and reality -----------------------------------------------------------------------------------------


def test_errors_are_relative_to_what_was_recorded():
    assert exercises.check_error(0.25, 40, 50)
    refused(exercises.check_error(-0.25, 40, 50), "sign")
    refused(exercises.check_error(0.2, 40, 50), "Relative to what was recorded")
    refused(exercises.check_error(10, 40, 50), "difference")
    refused(exercises.check_error(-10, 40, 50), "sign is that of the recording")
    refused(exercises.check_error(1.25, 40, 50), "ratio")
    refused(exercises.check_error(0.8, 40, 50), "upside down")
    assert exercises.check_error("\N{MINUS SIGN}20 %", 50, 40)
    refused(exercises.check_error(25, 40, 50), "fraction")
    refused(exercises.check_error(-25, 40, 30), "fraction of what was recorded")


def test_the_scatter_of_the_recording_is_found(plan, profile):
    recorded = lab.simulate(plan, lab.Temporal(), 4000, seed=5, variability=lab.Lognormal(0.5))
    args = (recorded, profile, lab.Temporal(), plan)
    assert exercises.check_scatter(0.5, *args)
    refused(exercises.check_scatter(0.01, *args), "scatter more")
    refused(exercises.check_scatter(1.5, *args), "scatter less")
    refused(exercises.check_scatter(50, *args), "A fraction")
    refused(exercises.check_scatter(-1, *args), "above 0")


def test_the_puzzle_of_scatter_can_be_found_by_its_hints(profile):
    """Halving an interval by "more" and "less" leads to an answer that passes."""
    plan = lab.optimize(lab.workload("C-2", profile, load=0.5), profile)
    recorded = exercises.scatter_puzzle(plan)
    low, high, verdict, tries = 0.0, 2.0, None, 0
    while not verdict:
        cv, tries = (low + high) / 2, tries + 1
        verdict = exercises.check_scatter(cv, recorded, profile, lab.Temporal(), plan)
        low, high = (cv, high) if "more" in verdict.message else (low, cv)
        assert tries < 8, verdict
    assert exercises.check_scatter(0.6, recorded, profile, lab.Temporal(), plan)


# ---- clusters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven(profile):
    return lab.workload("C-7", profile, load=1.6)


def placed(services, gpus: int, method: str) -> bool:
    try:
        lab.place(services, lab.Cluster(gpus=gpus), method)
    except lab.InfeasiblePlan:
        return False
    return True


@pytest.mark.slow
def test_the_fewest_gpus_are_those_of_place(seven, profile):
    for method in ("dstack", "exclusive"):
        fewest = next(n for n in range(1, 9) if placed(seven, n, method))
        assert exercises.check_fewest_gpus(fewest, seven, method, profile)
        assert not exercises.check_fewest_gpus(fewest + 1, seven, method, profile)
    refused(exercises.check_fewest_gpus(1, seven, "dstack", profile), "1.60 GPUs at least")
    refused(exercises.check_fewest_gpus(7, seven, "dstack", profile), "one service per GPU")


def test_gpus_are_counted_for_arrivals_of_ones_own(profile):
    @dataclass
    class Clock:  # may change, so it cannot be a key
        rate_rps: float

        def sample(self, duration_ms, rng):
            return np.arange(0, duration_ms, 1000 / self.rate_rps)

    light = [lab.Service("resnet50", 50, Clock(50))]
    assert exercises.check_fewest_gpus(1, light, "dstack", profile)
    assert exercises.check_fewest_gpus(1, light, "dstack", profile)


def test_every_placement_that_works_passes(seven, profile):
    cluster = lab.Cluster(gpus=3)
    found = lab.place(seven, cluster)
    assert exercises.check_assignment(found, seven, cluster)
    by_hand = {s.name: {r.gpu: r.part for r in found.of(s.name)} for s in seven}
    renamed = dict(zip(cluster.names, reversed(cluster.names), strict=True))
    assert exercises.check_assignment({n: {renamed[g]: p for g, p in w.items()} for n, w in by_hand.items()}, seven, cluster)


def test_a_placement_that_does_not_work_is_explained(seven):
    cluster, names = lab.Cluster(gpus=3), [s.name for s in seven]
    one = dict.fromkeys(names, "gpu0")
    refused(exercises.check_assignment(one, seven, cluster), "gpu0 would need more than 100")
    refused(exercises.check_assignment({**one, "vgg19": {"gpu1": 0.5}}, seven, cluster), "sum to 0.5")
    refused(exercises.check_assignment({**one, "vgg19": "gpu9"}, seven, cluster), "vgg19: name one or more of gpu0")
    refused(exercises.check_assignment({**one, "vgg19": ...}, seven, cluster), "no answer yet")
    refused(exercises.check_assignment({"vgg19": "gpu0"}, seven, cluster), "entry for each")


def test_a_placement_may_be_said_by_gpu_or_in_percent(seven):
    cluster, names = lab.Cluster(gpus=3), [s.name for s in seven]
    turns = {name: f"gpu{i % 3}" for i, name in enumerate(names)}
    assert exercises.check_assignment(turns, seven, cluster)
    by_gpu = {gpu: [name for name in names if turns[name] == gpu] for gpu in cluster.names}
    assert exercises.check_assignment(by_gpu, seven, cluster)
    assert exercises.check_assignment({**turns, "vgg19": {"gpu1": 50, "gpu2": 50}}, seven, cluster)
    by_gpu["gpu0"] = [name for name in by_gpu["gpu0"] if name != "resnet50"]
    refused(exercises.check_assignment(by_gpu, seven, cluster), "entry for each")
    refused(exercises.check_assignment({**turns, "vgg19": {"gpu0": 50, "gpu1": 20}}, seven, cluster), "sum to 70")


def test_a_placement_may_be_asked_to_be_even(seven):
    cluster = lab.Cluster(gpus=3)
    turns = {s.name: f"gpu{i % 3}" for i, s in enumerate(seven)}
    found = lab.place(seven, cluster)
    peak = lab.place([s for s in seven if turns[s.name] == "gpu0"], lab.Cluster(gpus=1)).peak_pct
    refused(
        exercises.check_assignment(turns, seven, cluster, most_pct=66), f"gpu0 needs {peak:.1f} GPU%", "at most 66", "needs only"
    )
    assert exercises.check_assignment(turns, seven, cluster, most_pct=80)
    assert exercises.check_assignment(found, seven, cluster, most_pct=66)
    with pytest.raises(ValueError, match="most_pct"):
        exercises.check_assignment(turns, seven, cluster, most_pct=0)

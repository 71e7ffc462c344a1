"""Exercises: every right answer passes, whatever its form or method; each likely mistake gets its own hint."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab import exercises
from dstack_lab.contention import Contention, Load
from dstack_lab.exercises.base import UNANSWERED, Mistake, Verdict, as_counts, as_names, as_number, close, graded, right, wrong
from dstack_lab.exercises.batches import why_infeasible
from dstack_lab.exercises.knees import busy_part
from dstack_lab.exercises.queues import mg1_wait_ms
from dstack_lab.gpu_specs import A100, T4, V100

RESNET, VGG, MOBILE = "resnet50", "vgg19", "mobilenet_v2"


@pytest.fixture(scope="module")
def profile():
    return lab.load_profile("v100-simulated")


@pytest.fixture(scope="module")
def services():
    return [lab.Service(RESNET, 50, lab.Poisson(900)), lab.Service(VGG, 100, lab.Poisson(400))]


def refused(verdict: Verdict, *words: str) -> None:
    """A failed verdict whose hint holds these words."""
    assert not verdict
    for word in words:
        assert word in verdict.message, verdict


# ---- verdicts and numbers -------------------------------------------------------------------------------------------


def test_a_verdict_is_a_sentence_and_a_truth_value():
    assert right("So it is.")
    assert not wrong("Look again.")
    assert repr(right("So it is.")) == "Right. So it is."
    assert repr(wrong("Look again.")) == "Not yet. Look again."
    with pytest.raises(dataclasses.FrozenInstanceError):
        right("x").passed = False


FORMS = [
    float,
    str,
    np.float64,
    np.array,
    lambda x: f"{x} %",
    lambda x: f" {x} ms",
    lambda x: [x],
    lambda x: (x,),
    lambda x: pd.Series([x]),
    lambda x: np.array([[x]]),
]


@pytest.mark.parametrize("form", FORMS)
@given(number=st.floats(0.001, 1e6))
def test_a_number_may_come_in_any_form(form, number):
    assert as_number(form(number)) == pytest.approx(number)


@pytest.mark.parametrize("answer", [True, np.True_, "", "half", "1 2 3", [1, 2], [], {}, pd.Series([1, 2]), object(), 1j, [True]])
def test_what_is_no_number(answer):
    assert as_number(answer) is None
    refused(graded(answer, 1.0, "ms", "why"), "Give one number [ms]")


@given(truth=st.floats(1e-3, 1e6), digits=st.integers(2, 8))
def test_rounding_to_two_digits_or_more_is_right(truth, digits):
    assert close(float(f"{truth:.{digits}g}"), truth)


@given(truth=st.floats(1e-3, 1e6), factor=st.one_of(st.floats(0.01, 0.94), st.floats(1.06, 100)))
def test_what_is_far_off_is_wrong(truth, factor):
    assert not close(factor * truth, truth)


@pytest.mark.parametrize("answer", [..., None])
def test_three_dots_are_no_answer(answer):
    assert graded(answer, 1.0, "", "why") == wrong(UNANSWERED)


def test_nan_is_no_answer():
    refused(graded(float("nan"), 1.0, "", "why"), "Give one number")


def test_a_mistake_that_equals_the_truth_is_right():
    assert graded(5, 5.0, "", "why", [Mistake(5.0, "no")])
    refused(graded(7, 5.0, "", "why", [Mistake(math.nan, "nan"), Mistake(7.0, "seven")]), "seven")


def test_too_small_and_too_large_are_told():
    refused(graded(1, [5.0, 6.0], "", "why", hint="H."), "too small. H.")
    refused(graded(9, [5.0, 6.0], "", "why", hint="H."), "too large. H.")
    refused(graded(5.5, [5.0, 6.0], "", "why", hint="H."), "far from any right answer")


@pytest.mark.parametrize(
    ("answer", "unit", "words"),
    [
        (0.03, "ms", "seconds"),
        (30_000, "ms", "us"),
        (3_000, "fraction", "fraction"),
        (0.3, "GPU%", "GPU%"),
        (0.03, "requests/s", "per ms"),
    ],
)
def test_a_slip_of_units_is_named(answer, unit, words):
    refused(graded(answer, 30.0, unit, "why"), words)


def test_counts_by_name_or_in_order():
    assert as_counts({"a": 1, "b": "20 %"}, ["a", "b"]) == {"a": 1.0, "b": 20.0}
    assert as_counts([1, 2], ["a", "b"]) == as_counts(pd.Series({"b": 2, "a": 1}), ["a", "b"]) == {"a": 1.0, "b": 2.0}
    assert as_counts({"a": 1}, ["a", "b"]) is as_counts({"a": 1, "b": "x"}, ["a", "b"]) is as_counts(3, ["a"]) is None


def test_names_from_text_or_list():
    assert (
        as_names("B and C")
        == as_names("B, C")
        == as_names(["C", "B"])
        == as_names({"B", "C"})
        == as_names(("B", "C"))
        == {"B", "C"}
    )
    assert as_names([]) == as_names("") == set()
    assert as_names([1]) is as_names(3) is None


@pytest.mark.parametrize("name", [n for n in exercises.__all__ if n.startswith("check_")])
def test_every_check_says_what_it_wants(name):
    assert getattr(lab.exercises, name).__doc__.startswith("Judge ")


# ---- knees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [RESNET, VGG, MOBILE])
@pytest.mark.parametrize("rule", ["tolerance", "chord", "marginal", "efficacy"])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_knee_by_any_grid_is_right(profile, model, rule, batch):
    curve = lab.fit(profile, model)
    rows = profile.of(model).query("batch == @batch")
    by_hand = [
        curve.knee_pct(batch, rule),
        curve.knee_pct(batch, rule, shares=rows["gpu_pct"]),
        curve.knee_pct(batch, rule, shares=np.arange(5, 101)),
    ]
    for answer in by_hand:
        assert lab.exercises.check_knee(answer, profile, model, batch, rule)
    assert not lab.exercises.check_knee(1, profile, model, batch, rule) or min(by_hand) <= 6


def test_the_knee_by_its_definition(profile):
    rows = profile.of(RESNET).query("batch == 8")
    answer = rows[rows["service_ms"] <= 1.05 * rows["service_ms"].min()]["gpu_pct"].min()
    assert lab.exercises.check_knee(answer, profile, RESNET, 8)


def test_wrong_knees_teach(profile):
    check = lab.exercises.check_knee
    curve = lab.fit(profile, RESNET)
    refused(check(100, profile, RESNET, 1), "100 GPU% is the fastest share")
    refused(check(curve.knee_pct(1, "efficacy"), profile, RESNET, 1), "rule 'efficacy'", "names the rule 'tolerance'")
    refused(check(curve.knee_pct(4), profile, RESNET, 1), "knee at batch")
    refused(check(curve.knee_pct(1) / 100, profile, RESNET, 1), "not as a fraction")
    refused(check("?", profile, RESNET, 1), "Give one number [GPU%]")
    refused(check(..., profile, RESNET, 1), UNANSWERED)
    refused(check(30, profile, RESNET, 1), "too small", "The rule 'tolerance': smallest share whose service time is within 5 %")


def test_a_capacity_knee_needs_an_slo(profile):
    curve = lab.fit(profile, RESNET)
    assert lab.exercises.check_knee(curve.knee_pct(8, "capacity", slo_ms=50), profile, RESNET, 8, "capacity", 50)
    with pytest.raises(ValueError, match="slo_ms"):
        lab.exercises.check_knee(50, profile, RESNET, 64, "capacity", 5)


intervals = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), min_size=1, max_size=12)


@given(intervals)
def test_busy_time_counts_overlaps_once(pairs):
    start, end = np.array([s for s, _ in pairs]), np.array([min(s + d, 100) for s, d in pairs])
    busy = {t for s, e in zip(start, end, strict=True) for t in range(s, e)}
    assert busy_part(start, end, 100) == pytest.approx(len(busy) / 100)


@pytest.fixture(scope="module")
def trace(profile):
    plan = lab.optimize([lab.Service(MOBILE, 25, lab.Poisson(400)), lab.Service(RESNET, 50, lab.Poisson(200))], profile)
    return lab.simulate(plan, lab.DStack(pool=False), 2_000, seed=3)


def test_what_nvidia_smi_shows(trace):
    runs = trace.launches.sort_values("start_ms")
    ticks = np.arange(0, trace.duration_ms, 0.02)
    starts, ends = runs["start_ms"].to_numpy(), runs["end_ms"].to_numpy()
    running = [((starts <= t) & (t < ends)).any() for t in ticks]
    assert lab.exercises.check_smi_utilization(np.mean(running), trace)
    held = ((runs["end_ms"] - runs["start_ms"]) * runs["gpu_pct"]).sum() / 100 / trace.duration_ms
    took = (runs["end_ms"] - runs["start_ms"]).sum() / trace.duration_ms
    check = lab.exercises.check_smi_utilization
    refused(check(lab.summary(trace)["utilization"].iloc[-1], trace), "counts the SMs")
    refused(check(held, trace), "weighs each launch")
    refused(check(took, trace), "overlap count once")
    refused(check(100 * np.mean(running), trace), "as a fraction")
    assert check(f"{100 * np.mean(running):.1f} %", trace)


gpus = st.sampled_from([V100, T4, A100])


@given(gpus, st.integers(1, 2000), st.sampled_from([1.0, 5, 10, 25, 40, 50, 75, 100]), st.integers(1, 16))
def test_waves_counted_one_by_one(gpu, blocks, share, resident):
    left, waves = blocks, 0
    while left > 0:
        left, waves = left - int(gpu.sms_at(share)) * resident, waves + 1
    assert lab.exercises.check_waves(waves, blocks, gpu, share, resident)
    assert not lab.exercises.check_waves(waves + 1, blocks, gpu, share, resident)
    assert not lab.exercises.check_waves(waves - 1, blocks, gpu, share, resident)


def test_wrong_waves_teach():
    check, case = lab.exercises.check_waves, (300, V100, 25, 2)  # 20 SMs hold 40 blocks: 7.5 waves
    assert check(8, *case)
    refused(check(7, *case), "left over")
    refused(check(7.5, *case), "not full takes as long")
    refused(check(3.3, *case), "whole number")
    refused(check(2, *case), "only 20 of the 80")
    refused(check(15, *case), "holds 2 blocks")
    refused(check(40, *case), "at a time, one wave")
    refused(check(20, *case), "number of SMs")


@given(gpus, st.integers(1, 3000), st.integers(1, 8), st.integers(1, 100))
@settings(max_examples=60)
def test_wave_knees_by_definition(gpu, blocks, resident, answer):
    def waves(sms: int) -> int:
        return math.ceil(blocks / (sms * resident))

    granted = int(gpu.sms_at(answer))
    fewest = min(int(s) for s in np.unique(gpu.sms_at(np.linspace(1, 100, 1981))) if waves(int(s)) == waves(gpu.sms))
    assert bool(lab.exercises.check_wave_knee(answer, blocks, gpu, resident)) == (granted == fewest)


def test_wrong_wave_knees_teach():
    check = lab.exercises.check_wave_knee
    refused(check(100, 60, V100, 1), "not the least")
    refused(check(50, 60, V100, 1), "2 waves")
    refused(check(0.75, 60, V100, 1), "fraction")
    refused(check(120, 60, V100, 1), "1 to 100")
    refused(check(75, 300, V100, 2), "75 SMs may be enough, but the question asks for a share")
    refused(check(76, 300, V100, 2), "76 SMs may be enough, but the question asks for a share")
    assert "2 at a time" in check(93.75, 300, V100, 2).message
    refused(check(..., 60, V100, 1), UNANSWERED)
    assert check(75, 60, V100, 1)
    assert check("75 %", 60, V100, 1)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "slo_ms", "share"), [(RESNET, 50, 100), (RESNET, 50, 50), (VGG, 100, 100), (MOBILE, 25, 30)])
def test_the_largest_batch(profile, model, slo_ms, share):
    curve = lab.fit(profile, model)
    check = lab.exercises.check_largest_batch
    truth = max(b for b in range(1, 65) if 2 * curve.predict(b, share) <= slo_ms)
    assert check(truth, profile, model, slo_ms, share)
    once = max(b for b in range(1, 65) if curve.predict(b, share) <= slo_ms)
    refused(check(once, profile, model, slo_ms, share), "just missed a launch")
    refused(check(truth + 0.5, profile, model, slo_ms, share), "whole number")
    refused(check(1, profile, model, slo_ms, share), "")
    refused(check(..., profile, model, slo_ms, share), UNANSWERED)


def test_neighbours_of_the_largest_batch_get_a_hint(profile):
    check, curve = lab.exercises.check_largest_batch, lab.fit(profile, RESNET)
    truth = max(b for b in range(1, 65) if 2 * curve.predict(b, 100) <= 50)
    refused(check(truth + 1, profile, RESNET, 50), "One too many")
    refused(check(truth - 1, profile, RESNET, 50), "one more request does too")
    refused(check(32, profile, RESNET, 50), "largest profiled batch")


@pytest.mark.parametrize("objective", ["efficacy", "capacity"])
@pytest.mark.parametrize(("model", "slo_ms", "rate"), [(RESNET, 50, 400), (VGG, 100, 120), (MOBILE, 25, 300)])
def test_operating_points(profile, objective, model, slo_ms, rate):
    service = lab.Service(model, slo_ms, lab.Poisson(rate))
    plan = lab.optimize([service], profile, objective)
    best = plan.allocations[0]
    check = lab.exercises.check_operating_point
    pair = (best.batch, best.gpu_pct)
    forms = [plan, best, pair, list(pair), np.array(pair), {"batch": pair[0], "gpu_pct": pair[1]}, plan.to_frame().iloc[0]]
    for form in forms:
        assert check(form, service, profile, objective), form
    other = lab.optimize([service], profile, "capacity" if objective == "efficacy" else "efficacy").allocations[0]
    if (other.batch, other.gpu_pct) != pair:
        refused(check(other, service, profile, objective), "best point for")
    refused(check((64, 5), service, profile, objective), "takes")
    refused(check(30, service, profile, objective), "Give a pair")
    refused(check((2.5, 40), service, profile, objective), "first number is the batch")
    refused(check((50, 0.5), service, profile, objective), "first number is the batch")
    refused(check((500, 50), service, profile, objective), "whole number from 1 to")
    refused(check(None, service, profile, objective), UNANSWERED)


def test_an_operating_point_is_right_only_near_the_best_score(profile):
    """Brute force over a coarse grid: what passes is feasible and within 1 % of the best; what fails is not."""
    service = lab.Service(RESNET, 50, lab.Poisson(400))
    curve = lab.fit(profile, RESNET)
    shares = sorted(profile.of(RESNET)["gpu_pct"].unique())

    def worth(b: int, g: float) -> float:
        ms = curve.predict(b, g)
        keeps = 2 * ms <= 50 and (b - 1) / 0.4 + ms <= 50 and 0.4 * ms <= b
        return b / (ms**2 * g) if keeps else 0.0

    best = max(worth(b, g) for b, g in itertools.product(range(1, 65), shares))
    for b, g in itertools.product((1, 2, 4, 6, 7, 8, 9, 10, 16, 32), (10, 30, 60, 75, 80, 85, 100)):
        verdict = lab.exercises.check_operating_point((b, g), service, profile)
        assert bool(verdict) == (worth(b, g) >= 0.99 * best), (b, g, verdict)


def test_a_broken_constraint_is_named(profile):
    check, service = lab.exercises.check_operating_point, lab.Service(RESNET, 50, lab.Poisson(400))
    refused(
        check((32, 100), service, profile), "twice the service time" if lab.fit(profile, RESNET).predict(32, 100) > 40 else "ms"
    )
    refused(check((1, 10), service, profile), "fewer than the 400 that arrive")
    swapped = lab.optimize([service], profile).allocations[0]
    refused(check((swapped.gpu_pct, swapped.batch), service, profile), "swapped")
    refused(check((50, 8), service, profile), "Batch 50 at 8 GPU%", "swapped")
    refused(check((4, 10), service, profile), "Batch 4 at 10 GPU%")
    assert "swapped" not in check((4, 10), service, profile).message
    slow = lab.Service(RESNET, 200, lab.Poisson(20))
    refused(check((8, 100), slow, profile), "first request of a batch waits")
    refused(check((4, 100), service, profile), "below the best", "search all pairs")


@pytest.fixture(scope="module")
def cases():
    poisson = lab.Poisson
    return {
        "A": [lab.Service(RESNET, 50, poisson(400)), lab.Service(VGG, 100, poisson(120))],
        "B": [lab.Service(RESNET, 50, poisson(900)), lab.Service(VGG, 100, poisson(400))],
        "C": [lab.Service(VGG, 10, poisson(1)), lab.Service(MOBILE, 25, poisson(10))],
    }


def test_infeasible_cases_agree_with_the_optimizer(profile, cases):
    for found in cases.values():
        if why_infeasible(found, profile):
            with pytest.raises(lab.InfeasiblePlan):
                lab.optimize(found, profile)
        else:
            lab.optimize(found, profile)
    assert {name: why_infeasible(found, profile) for name, found in cases.items()} == {"A": "", "B": "total", "C": "SLO"}


@pytest.mark.parametrize("answer", ["B, C", "C B", "b, c", "C and B", ["B", "C"], {"C", "B"}, ("B", "C")])
def test_the_infeasible_cases_in_any_form(profile, cases, answer):
    assert lab.exercises.check_infeasible(answer, cases, profile)


def test_wrong_infeasible_cases_teach(profile, cases):
    check = lab.exercises.check_infeasible
    refused(check("C", cases, profile), "case B", "together")
    refused(check("B", cases, profile), "case C", "its own SLO")
    refused(check("A, B, C", cases, profile), "Case A can be served")
    refused(check("D", cases, profile), "some of A, B, C")
    refused(check(3, cases, profile), "some of A, B, C")
    refused(check(..., cases, profile), UNANSWERED)


def test_the_bound(profile, services):
    check = lab.exercises.check_bound
    truth = lab.bound(services, profile).total_rps
    curves = [lab.fit(profile, s.model) for s in services]
    shares = sorted(profile.table["gpu_pct"].unique())
    by_hand = []
    for service, curve in zip(services, curves, strict=True):
        points = [(g * curve.predict(b, g) / b, curve.predict(b, g)) for b in range(1, 65) for g in shares]
        by_hand.append(min(area for area, ms in points if ms <= service.slo_ms))
    assert check(truth, services, profile)
    assert check(900 + (100_000 - 900 * by_hand[0]) / by_hand[1], services, profile)
    refused(check(1300, services, profile), "what arrives")
    asked = (900 * by_hand[0] + 400 * by_hand[1]) / 100_000
    refused(check(1300 / asked, services, profile), "same part of every rate")
    refused(check(100_000 / min(by_hand), services, profile), "fewer of them arrive")
    refused(check(0.001 * truth, services, profile), "per ms")
    refused(check(900, services, profile), "part of resnet50 alone")
    refused(check(100 * asked, services, profile), "GPU% that all requests together")
    refused(check(10, services, profile), "too small")


def test_a_bound_on_the_whole_gpu_is_named(profile):
    tight = [lab.Service(MOBILE, 8, lab.Poisson(20_000)), lab.Service("alexnet", 8, lab.Poisson(20_000))]
    areas = []
    for service in tight:
        curve = lab.fit(profile, service.model)
        areas.append(min(100 * curve.predict(b, 100) / b for b in range(1, 65) if curve.predict(b, 100) <= service.slo_ms))
    served = min(20_000, 1e5 / min(areas))
    served += (1e5 - served * min(areas)) / max(areas)
    refused(lab.exercises.check_bound(served, tight, profile), "whole GPU")


# ---- queues ---------------------------------------------------------------------------------------------------------

rates, times, spreads = st.floats(1, 90), st.floats(0.5, 10), st.floats(0, 3)


@given(st.floats(1, 1000), st.floats(0.1, 50), st.integers(1, 16))
def test_load(rate, ms, batch):
    assert lab.exercises.check_load(rate / batch * ms / 1000, rate, ms, batch)


def test_wrong_loads_teach():
    check = lab.exercises.check_load
    assert check("0.6", 480, 10, 8)
    refused(check(72, 480, 12, 8), "fraction")
    refused(check(4.8, 480, 10, 8), "serves 8 requests at once")
    refused(check(600, 480, 10, 8), "Mind the units")
    refused(check(0.4, 480, 10, 8), "nothing runs")
    refused(check(1 / 0.6, 480, 10, 8), "Upside down")
    refused(check(60, 480, 12, 8), "launches per second")
    refused(check(480 * 12 * 8 / 1000, 480, 12, 8), "share its service time")


@given(rates, times, spreads)
def test_waits_in_any_form_of_the_formula(rate, ms, cv):
    load = rate * ms / 1000
    second_moment = ms**2 * (1 + cv**2)  # lambda E[S²] / (2 (1 - rho))
    assert lab.exercises.check_wait(rate / 1000 * second_moment / (2 * (1 - load)), rate, ms, cv)


def test_the_wait_formula_is_what_a_queue_does():
    """Lindley's recursion, a simulation that shares nothing with the formula."""
    rng = np.random.default_rng(1)
    for cv in (0.0, 1.0):
        gaps, services = rng.exponential(10, 400_000), (rng.exponential(7, 400_000) if cv else np.full(400_000, 7.0))
        steps = np.cumsum(services[:-1] - gaps[1:])
        waits = steps - np.minimum.accumulate(np.minimum(steps, 0))
        assert waits.mean() == pytest.approx(mg1_wait_ms(100, 7, cv), rel=0.05)


def test_wrong_waits_teach():
    check = lab.exercises.check_wait
    truth = mg1_wait_ms(80, 10)  # load 0.8: 20 ms
    assert truth == pytest.approx(20)
    refused(check(30, 80, 10), "whole latency")
    refused(check(40, 80, 10), "M/M/1")
    refused(check(0.02, 80, 10), "seconds")
    refused(check(4, 80, 10), "1 / (1 - utilization)")
    refused(check(8, 80, 10), "grows without limit")
    refused(check(20, 80, 10, 2), "M/D/1")
    refused(check(60, 80, 10, 2), "squared")
    refused(check(50, 80, 10), "whole latency in M/M/1")
    refused(check(200, 80, 10, 2), "only half is left")
    refused(check(0.8, 80, 10), "utilization")
    refused(check(5, 80, 10), "left of a service in progress")
    refused(check(500, 80, 10), "too large")
    with pytest.raises(ValueError, match="stable"):
        check(1, 100, 10)


@given(times, st.floats(0.1, 100), spreads)
def test_the_rate_for_a_wait_inverts_the_formula(ms, wait, cv):
    low, high = 0.0, 1000 / ms
    for _ in range(80):  # bisection on the closed form
        middle = (low + high) / 2
        low, high = (middle, high) if mg1_wait_ms(max(middle, 1e-9), ms, cv) <= wait else (low, middle)
    assert lab.exercises.check_rate_for_wait(low, ms, wait, cv)


def test_wrong_rates_teach():
    check = lab.exercises.check_rate_for_wait  # 10 ms, wait 15 ms: load 0.75, 75/s
    assert check(75, 10, 15)
    refused(check(100, 10, 15), "no limit")
    refused(check(40, 10, 15), "evenly")
    refused(check(0.75, 10, 15), "utilization")
    refused(check(80, 5, 10), "in percent")
    refused(check(60, 10, 15), "exponential")
    refused(check(50, 10, 15), "whole latency")
    refused(check(0.075, 10, 15), "per ms")
    refused(check(90, 10, 15), "too large")


# ---- sharing --------------------------------------------------------------------------------------------------------


def test_slices_by_brute_force(profile):
    found = [lab.Service(MOBILE, 50, lab.Poisson(150)), lab.Service(RESNET, 100, lab.Poisson(100))]
    curves = [lab.fit(profile, s.model) for s in found]

    def enough(service, curve, g):
        r = service.rate_rps / 1000
        return any(
            max((b - 1) / r, ms) + ms <= service.slo_ms and r * ms <= b
            for b in range(1, 65)
            for ms in [float(curve.predict(b, g))]
        )

    passed = 0
    for mine, other in itertools.product(range(5, 100, 15), repeat=2):
        works = mine + other <= 100 and enough(found[0], curves[0], mine) and enough(found[1], curves[1], other)
        for answer in ({MOBILE: mine, RESNET: other}, [mine, other], pd.Series({RESNET: other, MOBILE: mine})):
            assert bool(lab.exercises.check_slices(answer, found, profile)) == works, answer
        passed += works
    assert 0 < passed < 49


def test_wrong_slices_teach(profile):
    check = lab.exercises.check_slices
    found = [lab.Service(MOBILE, 25, lab.Poisson(500)), lab.Service(VGG, 100, lab.Poisson(100))]
    refused(check([60, 60], found, profile), "sum to 120")
    refused(check([0.4, 0.6], found, profile), "not as fractions")
    refused(check([40, 200], found, profile), "1 to 100")
    refused(check([90, 5], found, profile), "vgg19 is too slow")
    refused(check([5, 90], found, profile), "mobilenet_v2")
    refused(check(50, found, profile), "one GPU% for each of mobilenet_v2, vgg19")
    refused(check(..., found, profile), UNANSWERED)


def _load(profile, model, batch, share):
    ms = float(lab.fit(profile, model).predict(batch, share))
    curve = np.asarray(lab.fit(profile, model).predict(batch, np.arange(1, 101)))
    knee = float(np.flatnonzero(curve <= 1.05 * curve.min())[0] + 1)
    table = lab.bound  # never asked: turns need only times and knees
    return Load(table, batch, share, ms, min(knee, share))


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ((RESNET, 4, 40), [(VGG, 2, 50)]),
        ((MOBILE, 8, 100), [(VGG, 8, 100)]),
        ((RESNET, 8, 100), [(VGG, 8, 100), (MOBILE, 8, 100)]),
    ],
)
def test_time_beside_others(profile, mine, others):
    check = lab.exercises.check_beside
    loads = [_load(profile, *x) for x in (mine, *others)]
    factor = Contention().stretch(loads)[0]
    alone = loads[0].service_ms
    assert check(alone * factor, profile, mine, others)
    assert check(round(alone * factor, 1), profile, mine, others)
    refused(check(alone, profile, mine, others), "time alone")
    refused(check(factor, profile, mine, others), "a factor")
    if sum(load.knee_pct for load in loads) > 100:
        refused(check(alone * Contention(0.0).stretch(loads)[0], profile, mine, others), "shared memory")
    refused(check(1e4, profile, mine, others), "too large", "add up the GPU%")


def test_a_slip_in_the_slowdown_is_named(profile):
    mine, others = (RESNET, 8, 50), [(VGG, 4, 50)]
    check = lab.exercises.check_beside
    own, other = (float(lab.fit(profile, model).predict(batch, share)) for model, batch, share in (mine, *others))
    right_ms = own * (1 + 0.096 * (other / own) ** 0.1)
    assert check(right_ms, profile, mine, others)
    points = [profile.of(m).query("batch == @b and gpu_pct == @g")["service_ms"].item() for m, b, g in (mine, *others)]
    assert check(points[0] * (1 + 0.096 * (points[1] / points[0]) ** 0.1), profile, mine, others)
    refused(check(own * (1 + 0.096 * (own / other) ** 0.1), profile, mine, others), "upside down")
    refused(check(1.096 * own, profile, mine, others), "leaves the ratio")
    refused(check(right_ms - own, profile, mine, others), "only what is added")
    refused(check(right_ms / own - 1, profile, mine, others), "as a fraction")
    refused(check(other, profile, mine, others), "neighbour's time alone")
    refused(check(own + other, profile, mine, others), "in a row")
    whole, neighbour = ((m, b, 100) for m, b, _ in (mine, *others))
    alone, beside = (float(lab.fit(profile, m).predict(b, 100)) for m, b, _ in (whole, neighbour))
    slowed = alone * (1 + 0.096 * (beside / alone) ** 0.1)
    refused(check(slowed, profile, whole, [neighbour]), "must be waited for")


def test_proportional_sharing_is_named(profile):
    mine, others = (MOBILE, 8, 100), [(VGG, 8, 100)]
    model = lab.fit(profile, MOBILE)
    loads = [_load(profile, *mine), _load(profile, *others[0])]
    at = min(loads[0].knee_pct * 100 / sum(load.knee_pct for load in loads), 100)
    slow = 1 + 0.096 * (loads[1].service_ms / loads[0].service_ms) ** 0.1
    refused(lab.exercises.check_beside(slow * float(model.predict(8, at)), profile, mine, others), "kernels take turns")


# ---- no hint tells the answer ---------------------------------------------------------------------------------------


@given(st.floats(1, 99))
@settings(max_examples=40)
def test_hints_do_not_tell(answer):
    profile = lab.load_profile("v100-simulated")
    checks = [
        (lab.exercises.check_wait(answer, 80, 10), 20.0),
        (lab.exercises.check_rate_for_wait(answer, 10, 15), 75.0),
        (lab.exercises.check_waves(answer, 300, V100, 25, 2), 8.0),
        (lab.exercises.check_largest_batch(answer, profile, RESNET, 50, 100), None),
    ]
    for verdict, truth in checks:
        if not verdict and truth is not None:
            assert (
                truth not in [float(n) for n in re.findall(r"\d+(?:\.\d+)?", verdict.message.replace("of the 80", ""))]
                or truth == answer
            )

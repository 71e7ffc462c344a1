"""Exercises on the knee: how much of a GPU a network can use, and why."""

from __future__ import annotations

import math

import numpy as np

from dstack_lab import knees
from dstack_lab.checks import count, percent, require
from dstack_lab.exercises.base import Mistake, Verdict, as_number, graded, is_whole, unanswered, wrong
from dstack_lab.gpu_model import fit
from dstack_lab.gpu_specs import GpuSpec
from dstack_lab.metrics import utilization
from dstack_lab.profiles import Profile
from dstack_lab.traces import Trace

#: A share whose score is within this of the best is as good as the best, for rules that maximise a score.
TIE = 0.01


def check_knee(
    answer: object, profile: Profile, model: str, batch: int, rule: str = "tolerance", slo_ms: float | None = None
) -> Verdict:
    """Judge a knee [GPU%] under a named rule.

    The profile's own shares, 5 % steps and 1 % steps of the fitted curve give slightly different
    knees; all of them, and what lies between, are right.

    Parameters
    ----------
    answer : number
        GPU%.
    profile, model, batch
        The curve.
    rule : str
        One of `knees.RULES`.
    slo_ms : float, optional
        For the rule ``capacity`` [ms].
    """
    good = _knees(profile, model, batch, rule, slo_ms)
    require(bool(good), "slo_ms", slo_ms, "met by at least one share")
    why = f"Under the rule '{rule}' the knee of {model} at batch {batch} is there: more GPU% could serve another network."
    given = as_number(answer)
    if given is not None and (min(good) - 0.5 <= given <= max(good) + 0.5 or _ties(given, profile, model, batch, rule, slo_ms)):
        return graded(given, given, "GPU%", why)
    mistakes = [Mistake(100.0, "100 GPU% is the fastest share. The knee is the share from which on more hardly helps.")]
    for other in knees.RULES:
        if other != rule and not (other == "capacity" and slo_ms is None):
            said = f"That is the knee under the rule '{other}'. The question names the rule '{rule}'."
            mistakes += [Mistake(k, said) for k in _knees(profile, model, batch, other, slo_ms)]
    for other_batch in sorted({1, 2, 4, 8, 16, 32} - {batch}):
        said = f"That is the knee at batch {other_batch}. A larger batch has more parallel work: take batch {batch}."
        mistakes += [Mistake(k, said) for k in _knees(profile, model, other_batch, rule, slo_ms)]
    curve = fit(profile, model)
    mistakes.append(
        Mistake(
            float(curve.predict(batch, good[0])), "That is the service time [ms] at the knee. The knee itself is a share [GPU%]."
        )
    )
    asked = (knees.RULES[rule].__doc__ or "").splitlines()[0]
    hint = f"Plot the service time at batch {batch} against GPU%. The rule '{rule}': {asked[0].lower()}{asked[1:]}"
    return graded(answer, good, "GPU%", why, mistakes, hint)


def check_smi_utilization(answer: object, trace: Trace) -> Verdict:
    """Judge the utilization [fraction] that nvidia-smi would show of a run.

    The driver reports the part of the time in which *some* kernel ran, however few SMs it used.

    Parameters
    ----------
    answer : number
        Fraction, from 0 to 1.
    trace : Trace
        A run; launches count while they last, up to the end of the arrivals.
    """
    runs = trace.launches
    start, end = (runs[c].clip(0, trace.duration_ms).to_numpy(dtype=float) for c in ("start_ms", "end_ms"))
    held = float(((end - start) * runs["gpu_pct"].to_numpy(dtype=float)).sum()) / 100 / trace.duration_ms
    mistakes = [
        Mistake(
            float(utilization(trace).sum()),
            "That counts the SMs in use. nvidia-smi does not: it asks only whether any kernel ran.",
        ),
        Mistake(
            held, "That weighs each launch with its share. nvidia-smi does not know shares: any running kernel counts in full."
        ),
        Mistake(
            float((end - start).sum()) / trace.duration_ms, "Launches that overlap count once: the GPU is busy or it is not."
        ),
    ]
    why = "Some kernel ran for that part of the time, and this is all that nvidia-smi reports: not how many SMs were in use."
    return graded(
        answer,
        busy_part(start, end, trace.duration_ms),
        "fraction",
        why,
        mistakes,
        "Add up the time in which at least one launch ran.",
    )


def busy_part(start: np.ndarray, end: np.ndarray, duration_ms: float) -> float:
    """Part of [0, duration_ms) that at least one of the intervals covers; both arrays of shape (n,) [ms]."""
    order = np.argsort(start, kind="stable")
    covered, reached = 0.0, 0.0
    for s, e in zip(start[order], end[order], strict=True):
        covered += max(0.0, e - max(s, reached))
        reached = max(reached, e)
    return covered / duration_ms


def check_waves(answer: object, blocks: int, gpu: GpuSpec, gpu_pct: float, resident: int = 1) -> Verdict:
    """Judge in how many waves a kernel's thread blocks run.

    Parameters
    ----------
    answer : number
        Waves, a whole number.
    blocks : int
        Thread blocks of the kernel.
    gpu : GpuSpec
    gpu_pct : float
        Share [GPU%].
    resident : int
        Blocks that one SM holds at a time.
    """
    count("blocks", blocks)
    count("resident", resident)
    sms = int(gpu.sms_at(percent("gpu_pct", gpu_pct)))
    slots = sms * resident
    truth = math.ceil(blocks / slots)
    whole = math.ceil(blocks / (gpu.sms * resident))
    given = as_number(answer)
    if given is not None and not is_whole(given):
        exact = blocks / slots
        said = (
            "A last wave that is not full takes as long as a full one: waves are whole."
            if abs(given - exact) < 0.06 * exact
            else ""
        )
        return wrong(said or "Waves are counted: give a whole number.")
    mistakes = [
        Mistake(float(blocks // slots), "The blocks that are left over need one more wave, even if it is nearly empty."),
        Mistake(float(whole), f"That is on the whole GPU. At {gpu_pct:g} GPU% only {sms} of the {gpu.sms} SMs take blocks."),
        Mistake(
            float(math.ceil(blocks / sms)),
            f"Each SM holds {resident} blocks at a time, so a wave is larger than the number of SMs.",
        ),
        Mistake(
            float(slots),
            "That is how many blocks run at a time, one wave. How often does it take that many to get through all blocks?",
        ),
        Mistake(float(sms), "That is the number of SMs. How often must all of them be filled to get through all blocks?"),
    ]
    why = f"{sms} SMs hold {slots} blocks at a time, so {blocks} blocks take {truth} wave{'s' * (truth > 1)}."
    hint = f"First: how many SMs are {gpu_pct:g} % of {gpu.sms}? Then: how many blocks do they hold at a time?"
    return graded(answer, float(truth), "", why, mistakes, hint, rel=0)


def check_wave_knee(answer: object, blocks: int, gpu: GpuSpec, resident: int = 1) -> Verdict:
    """Judge the smallest share [GPU%] at which a kernel needs no more waves than on the whole GPU.

    Any share that grants the least sufficient number of SMs is right.

    Parameters
    ----------
    answer : number
        GPU%.
    blocks, resident : int
        As for `check_waves`.
    gpu : GpuSpec
    """
    count("blocks", blocks)
    count("resident", resident)
    if unanswered(answer) or (given := as_number(answer)) is None:
        return graded(answer, 100.0, "GPU%", "")
    if not 1 <= given <= 100:
        return wrong(
            "Right idea, perhaps; give it in GPU%, from 1 to 100, not as a fraction."
            if 0 < given < 1
            else "A share lies from 1 to 100 GPU%."
        )

    def waves(share: float) -> int:
        return math.ceil(blocks / (int(gpu.sms_at(share)) * resident))

    whole, mine = waves(100.0), waves(given)
    # brute force over shares a tenth of a percent apart
    least = min(share for share in np.arange(1.0, 100.05, 0.1) if waves(min(float(share), 100.0)) == whole)
    if mine > whole and given in (math.ceil(blocks / (whole * resident)), int(gpu.sms_at(min(float(least) + 0.05, 100.0)))):
        return wrong(f"{given:g} SMs may be enough, but the question asks for a share: GPU% of {gpu.sms} SMs.")
    if mine > whole:
        return wrong(f"At {given:g} GPU% the kernel takes {mine} waves, on the whole GPU fewer. Give it more SMs.")
    if int(gpu.sms_at(given)) > int(gpu.sms_at(min(float(least) + 0.05, 100.0))):
        return wrong(f"{given:g} GPU% is enough, but not the least: some of these SMs stay idle, or empty, in the last wave.")
    return graded(
        given,
        given,
        "GPU%",
        f"{int(gpu.sms_at(given))} SMs are the fewest that need {whole} wave{'s' * (whole > 1)}: the kernel's knee"
        + (f" (SMs are granted {gpu.sm_step} at a time)." if gpu.sm_step > 1 else "."),
    )


def _grids(profile: Profile, model: str) -> list[np.ndarray]:
    """Shares a reader may choose from: the profile's, 5 % steps, 1 % steps."""
    own = np.unique(profile.of(model)["gpu_pct"].to_numpy(dtype=float))
    least = max(5.0, 5 * math.floor(own[0] / 5))
    return [own, np.arange(least, 101, 5.0), np.arange(math.ceil(own[0]), 101, 1.0)]


def _knees(profile: Profile, model: str, batch: int, rule: str, slo_ms: float | None) -> list[float]:
    """Knees by every way to choose the shares, of the fitted curve and of the profile's own points."""
    curve = fit(profile, model)
    found = [curve.knee_pct(batch, rule, shares=grid, slo_ms=slo_ms) for grid in _grids(profile, model)]
    rows = profile.of(model)
    rows = rows[rows["batch"] == batch].sort_values("gpu_pct")
    if len(rows):
        found.append(float(knees.knee_pct(rows["gpu_pct"], rows["service_ms"], rule, batch=batch, slo_ms=slo_ms)))
    return sorted(k for k in found if not math.isnan(k))


def _ties(given: float, profile: Profile, model: str, batch: int, rule: str, slo_ms: float | None) -> bool:
    """Whether a share is as good as the best, where the rule maximises a score that is nearly flat there."""
    if rule not in ("efficacy", "capacity") or not 1 <= given <= 100:
        return False
    curve, grid = fit(profile, model), _grids(profile, model)[-1]
    power = 2 if rule == "efficacy" else 1
    costs = np.asarray(curve.predict(batch, grid)) ** power * grid
    ms = float(curve.predict(batch, given))
    if slo_ms is not None and rule == "capacity":
        costs = costs[np.asarray(curve.predict(batch, grid)) <= slo_ms / 2]
        if ms > slo_ms / 2:
            return False
    return bool(ms**power * given <= (1 + TIE) * costs.min())

"""Exercises on how far a simulation is from what was recorded."""

from __future__ import annotations

from dstack_lab.checks import positive
from dstack_lab.exercises.base import UNANSWERED, Mistake, Verdict, as_number, graded, right, unanswered, wrong
from dstack_lab.metrics import ALL
from dstack_lab.policies import Policy, Temporal
from dstack_lab.profiles import Profile
from dstack_lab.services import Plan
from dstack_lab.simulator import simulate
from dstack_lab.traces import Trace
from dstack_lab.validation import validate
from dstack_lab.variability import Lognormal


def check_error(answer: object, recorded: float, simulated: float) -> Verdict:
    """Judge by how much [fraction] a simulation is off, relative to what was recorded; above 0 if it says more.

    Parameters
    ----------
    answer : number
    recorded, simulated : float
        In the same unit.
    """
    truth = simulated / positive("recorded", recorded) - 1
    mistakes = [
        Mistake(-truth, "The sign: above 0 means that the simulation says more than was recorded."),
        Mistake(1 - recorded / simulated, "Relative to what was recorded, for that is what happened."),
        Mistake(recorded / simulated - 1, "The simulation is judged by the recording, not the other way round."),
        Mistake(100 * truth, "Right idea; give it as a fraction of what was recorded, not in percent."),
        Mistake(simulated / recorded, "That is the ratio. By how much does it differ from 1?"),
        Mistake(simulated - recorded, "That is the difference, in the unit of both. Divide by what was recorded."),
        Mistake(recorded - simulated, "That is the difference, in the unit of both, and the sign is that of the recording."),
        Mistake(recorded / simulated, "That is the ratio, upside down: the recording is what the simulation is compared with."),
    ]
    why = "A relative error needs a reference, and the reference is what happened."
    return graded(answer, truth, "fraction", why, mistakes, "Simulated over recorded, less one.", rel=0.01)


def scatter_puzzle(plan: Plan) -> Trace:
    """Return a simulated minute in turns, with service times that scatter: by how much is the question.

    Parameters
    ----------
    plan : Plan
        What is served.
    """
    return simulate(plan, Temporal(), 60_000.0, seed=10, variability=Lognormal(0.6))


def check_scatter(
    answer: object, recorded: Trace, profile: Profile, policy: Policy, plan: Plan, tolerance: float = 0.05
) -> Verdict:
    """Judge a coefficient of variation of service times with which the simulation meets a recorded tail.

    Every value with which the simulated p99 latency of all requests is within `tolerance` of the recorded one is right.

    Parameters
    ----------
    answer : number
        Coefficient of variation, as in ``lab.Lognormal(cv)``.
    recorded : Trace
    profile, policy, plan
        What it was run with; see `validate`.
    tolerance : float
        Relative error of the p99.
    """
    if unanswered(answer):
        return wrong(UNANSWERED)
    given = as_number(answer)
    if given is None or not given > 0:
        return wrong("Give one number above 0: the standard deviation of the service times over their mean.")
    if given > 2:
        return wrong("A fraction is asked for: 0.1 means that service times scatter by 10 % around their mean.")
    table = validate(recorded, profile, policy, plan, variability=Lognormal(given))
    error = float(table.loc[table["service"] == ALL, "p99_ms_error"].to_numpy()[0])
    if abs(error) <= tolerance:
        return right(f"With cv = {given:g} the simulated p99 is {error:+.1%} off the recorded one.")
    more = "less" if error > 0 else "more"
    return wrong(f"With cv = {given:g} the simulated p99 is {error:+.1%} off: let the service times scatter {more}.")

"""The compiled engine: the same policies as machine code, for runs of millions of requests; needs numba.

A compiled run gives the trace of the Python engine, bit for bit. What it cannot do alike (a policy of
one's own, scattered service times, contention) it leaves to the Python engine, and where a policy breaks
a rule it stops, so that the Python engine can say how. A policy object is reset as in any run, but does
not keep what a compiled run learned. numba is imported by a compiled run only.
"""

from __future__ import annotations

import importlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import require
from dstack_lab.policies.base import Policy
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.temporal import Temporal
from dstack_lab.provenance import Provenance
from dstack_lab.services import Plan
from dstack_lab.state import NS_PER_MS
from dstack_lab.traces import Trace

Engine = Literal["auto", "python", "compiled"]
ENGINES = ("auto", "python", "compiled")
#: Requests from which on a run is compiled where it can be; below, loading the compiled engine takes longer than it saves.
MANY = 1_000_000
#: Mark of a run that broke a rule, or whose plan or arrivals a compiled form cannot take.
LEFT_TO_PYTHON = "python engine: the compiled one could not finish this run"
#: Room that each policy's compiled form lives in. Exact classes: a subclass may decide otherwise.
FORMS: dict[type[Policy], str] = {Temporal: "temporal", DStack: "dstack"}

#: Attributes that tell the Python engine when to ask a policy; the compiled forms know their classes' own.
SWITCHES = ("every_arrival", "oversubscribes")


def expected_requests(plan: Plan, duration_ms: float) -> float:
    """Requests that a run is expected to have."""
    return sum(service.rate_rps for service in plan.services) * duration_ms / 1000


def obstacle(policy: Policy) -> str:
    """Return what keeps runs of `policy` from being compiled, empty if nothing."""
    if type(policy) not in FORMS or any(_changes(type(policy), *pair) for pair in vars(policy).items()):
        return f"no compiled form of {policy.name}"
    try:
        importlib.import_module("numba")
    except ModuleNotFoundError:
        return "numba is not installed"
    except ImportError as error:  # one that was built for another numpy, say
        return f"numba cannot be imported: {error}"
    return ""


def _changes(kind: type[Policy], name: str, value: object) -> bool:
    """Whether an attribute of a policy object makes it another policy than its class: a method, a switch of the engine."""
    return name == "rewrite" or callable(getattr(kind, name, None)) or (name in SWITCHES and value != getattr(kind, name))


def choose(engine: Engine, plan: Plan, policy: Policy, duration_ms: float, as_predicted: bool) -> tuple[bool, tuple[str, ...]]:
    """Return whether to compile a run, and marks for its provenance.

    Raises
    ------
    ValueError
        If `engine` is unknown, or "compiled" where that cannot be; the message says how it can.
    """
    require(engine in ENGINES, "engine", engine, f"one of {ENGINES}")
    if engine == "python" or (engine == "auto" and expected_requests(plan, duration_ms) <= MANY):
        return False, ()
    found = obstacle(policy) if as_predicted else "service times scatter or launches slow each other"
    if engine == "auto":
        return not found, (f"python engine: {found}",) if found else ()
    cure = "'auto' or 'python'" if "numba" not in found else "'auto' or 'python', or install numba: pip install dstack-lab[fast]"
    require(not found, "engine", engine, f"{cure} ({found})")
    return True, ()


def simulate_compiled(
    plan: Plan,
    policy: Policy,
    duration_ms: float,
    seed: int,
    arrivals_ms: list[NDArray[np.float64]],
    stall_slos: int,
    made: Provenance,
) -> Trace | None:
    """Run a policy that was just reset; None if only the Python engine can tell what happens.

    Parameters
    ----------
    arrivals_ms : list of numpy.ndarray
        Arrival times of each service [ms]; emptied.
    stall_slos : int
        After the last arrival, a run without any launch for this many of the longest SLO is over.
    """
    from dstack_lab.compiled.books import DONE, LAST_NS, Books

    pairs = list(zip(plan.services, plan.allocations, plan.tables, strict=True))
    slo = [round(s.slo_ms * NS_PER_MS) for s, _, _ in pairs]
    wait = [round(min(policy.wait_ms(a, s.slo_ms), 1e12) * NS_PER_MS) for s, a, _ in pairs]
    if max(slo) > LAST_NS or min(wait) < 0 or any(a.batch > t.batch_max for _, a, t in pairs):
        return None
    books = Books(plan, arrivals_ms)
    if not books.sound:
        return None
    form = importlib.import_module(f"dstack_lab.compiled.{FORMS[type(policy)]}")
    duration_ns = round(duration_ms * NS_PER_MS)
    arrays = (np.array(slo, dtype=np.int64), np.array(wait, dtype=np.int64))
    how, launches, notes = form.run(policy, books, *arrays, duration_ns, stall_slos * max(slo))
    return books.to_trace(launches, notes, duration_ms, policy.name, seed, made) if how == DONE else None

"""A policy that breaks a rule stops the run: the error names it, the time and the decision, and hands back the trace so far."""

from __future__ import annotations

import itertools
import pickle
import re

import numpy as np
import pytest
from builders import plan, profile

import dstack_lab as lab
from dstack_lab import compiled
from dstack_lab.devices import Cpu
from dstack_lab.policies.base import Drop, Launch, Policy, Wake
from dstack_lab.services import ServiceTable


def raises(_):
    raise KeyError("oops")


def begins_then_raises(state):
    yield Launch("a", 100, 1)
    raise KeyError("later")


#: What a policy answers when a request of service "a" waits and nothing runs -> how the error goes on after policy and time.
BAD = {
    "more than is free": (
        lambda _: [Launch("a", 101, 1)],
        r": Launch\(.*gpu_pct=101.*gpu_pct must be from 1 to the 100 % that are",
    ),
    "more together than is free": (
        lambda _: [Launch("a", 100, 1), Launch("b", 100, 1)],
        r": Launch\(service='b', gpu_pct=100.*1 to the 0 % that are free",
    ),
    "an unknown service": (lambda _: [Launch("z", 100, 1)], r": Launch\(service='z'.*service must be one of \['a', 'b'\]"),
    "a batch above the queue": (lambda _: [Launch("a", 100, 2)], r": Launch\(.*batch=2.*at most the 1 requests that wait"),
    "a batch above the largest": (lambda _: [Launch("a", 100, 5)], r": Launch\(.*batch=5.*batch must be 1 to 4"),
    "a turn without end": (lambda s: [Wake(s.now_ms)], r": Wake\(.*more than 1000 turns at one instant"),
    "turns ever closer": (lambda s: [Wake(s.now_ms + 1e-5)], r": Wake\(.*more than 1000 turns at one instant"),
    "decisions without end": (
        lambda s: (Wake(s.now_ms + n) for n in itertools.count()),
        r": Wake\(.*more than 100000 decisions in one turn",
    ),
    "an exception": (raises, r" ms: KeyError\('oops'\)"),
    "an exception half-way": (begins_then_raises, r" ms: KeyError\('later'\)"),
    "one decision, no list": (lambda _: Launch("a", 100, 1), r": Launch\(.*decide must return a list"),
    "a number": (lambda _: 5, r": 5: decide must return a list"),
    "a text": (lambda _: "launch", r": 'launch': decide must return a list"),
    "an array": (lambda _: np.array([1, 2]), r": 1: a decision must be a Launch, Drop or Wake"),
    "a drop of more than wait": (lambda _: [Drop("a", 2)], r": Drop\(.*requests must be 1 to the 1 requests"),
    "a wake-up in the past": (lambda _: [Wake(0.5)], r": Wake\(.*at_ms must not be before now"),
}


class Wrong(Policy):
    """Serves the first request of "a", so that there is a trace to hand back, then answers as a case says."""

    def __init__(self, case: str) -> None:
        self.case = case

    def reset(self, made):
        self.served = 0

    def decide(self, state):
        if not state["a"].waiting or state.free_pct < 100:
            return []
        self.served += 1
        return [Launch("a", 100, 1)] if self.served == 1 else BAD[self.case][0](state)

    def shares(self, made):
        return {a.service: (100.0,) for a in made.allocations}


def check(error: lab.PolicyError, case: str, least_ms: float = 0.0) -> None:
    said = re.match(r"Wrong (?:raised )?at (\d+\.\d{6}) ms", str(error))
    assert said is not None, str(error)
    assert float(said[1]) >= least_ms
    assert re.search(BAD[case][1], str(error)), str(error)
    trace = error.trace
    assert (trace.requests["outcome"] == "served").sum() == 1
    assert len(trace.launches) == 1
    assert (trace.launches["end_ms"] <= float(said[1])).all()  # nothing that had not ended


@pytest.mark.parametrize("case", BAD)
def test_simulated(case):
    flat = ServiceTable(np.full((4, 100), 10.0))
    two = plan(("a", 50, lab.Replay([1, 25]), 100.0, 4, flat), ("b", 50, lab.Replay([25]), 100.0, 4, flat))
    with pytest.raises(lab.PolicyError) as caught:
        lab.simulate(two, Wrong(case), 50)
    check(caught.value, case, 25.0)
    assert caught.value.trace.requests["outcome"].tolist() == ["served", "unserved", "unserved"]
    assert caught.value.trace.policy == "Wrong"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["more together than is free", "an unknown service", "a turn without end", "an exception"])
def test_run_on_workers(case):
    times = ServiceTable(np.full((4, 100), 5.0))
    arrivals = {"a": lab.Replay([1.0, 400.0]), "b": lab.Replay([399.0])}
    services = tuple(lab.Service("squeezenet1_1", 500, came, name) for name, came in arrivals.items())
    points = tuple(lab.Allocation(name, 100.0, 4, 5.0, came.rate_rps) for name, came in arrivals.items())
    two = lab.Plan(services, points, (times, times), (100.0,), "test", lab.Provenance("measured", "this machine", "core sets"))
    with pytest.raises(lab.PolicyError) as caught:
        lab.run(two, Wrong(case), Cpu(), 500, seed=1)
    check(caught.value, case, 400.0)
    assert caught.value.trace.provenance.kind == "measured"


@pytest.mark.parametrize("jobs", [1, 2])
def test_compared(jobs, tmp_path):
    """The error reaches the caller from another process too, trace and all; what was finished stays."""
    toy = profile(a=(1.0, 0.5, 40), b=(2.0, 1.0, 60))
    services = [lab.Service("a", 50, lab.Poisson(20)), lab.Service("b", 50, lab.Poisson(10))]
    policies = [lab.Temporal(), Wrong("an unknown service")]
    with pytest.raises(lab.PolicyError) as caught:
        lab.compare(services, toy, policies, loads=(0.5,), seeds=(0, 1), duration_ms=500, folder=tmp_path, jobs=jobs)
    check(caught.value, "an unknown service")
    assert jobs > 1 or len(list(tmp_path.iterdir())) > 0


def test_an_error_survives_the_way_to_another_process():
    flat = ServiceTable(np.full((4, 100), 10.0))
    with pytest.raises(lab.PolicyError) as caught:
        lab.simulate(plan(("a", 50, lab.Replay([1, 25]), 100.0, 4, flat)), Wrong("a number"), 50)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.trace.requests.equals(caught.value.trace.requests)


def test_a_thousand_turns_at_one_instant_are_let_pass_and_more_are_not():
    """Every request is launched by a turn of its own, which asks for the next turn at the same instant."""

    class OneByOne(Policy):
        oversubscribes = True

        def decide(self, state):
            view = state["a"]
            if not view.waiting:
                return []
            return [Launch("a", 1, 1), *([Wake(state.now_ms)] if view.waiting > 1 and state.now_ms == 0 else [])]

    flat = ServiceTable(np.full((4, 100), 10.0))
    few = plan(("a", 50, lab.Replay([0.0] * 900), 100.0, 4, flat))
    quiet = lab.Contention(slowdown=0)
    assert len(lab.simulate(few, OneByOne(), 50, contention=quiet).launches) == 900
    many = plan(("a", 50, lab.Replay([0.0] * 1500), 100.0, 4, flat))
    with pytest.raises(lab.PolicyError, match=r"OneByOne at 0\.000000 ms: Launch.*more than 1000 turns at one instant"):
        lab.simulate(many, OneByOne(), 50, contention=quiet)


@pytest.mark.parametrize("name", ["decide", "reset", "wait_ms", "shares", "_fill", "_batch"])
def test_a_policy_of_ones_own_never_enters_the_compiled_engine(name):
    own = type("Own", (lab.DStack,), {})()
    patched = lab.DStack()
    setattr(patched, name, lambda *_: [])
    asked = lab.DStack()
    asked.every_arrival = True
    flat = ServiceTable(np.full((4, 100), 10.0))
    made = plan(("a", 50, lab.Poisson(10), 100.0, 4, flat))
    for policy in (own, patched, asked, Wrong("a number")):
        assert compiled.obstacle(policy) == f"no compiled form of {policy.name}"
        with pytest.raises(ValueError, match="engine = 'compiled'"):
            lab.simulate(made, policy, 10, engine="compiled")
        hour_ms = 1.5e6 / 10 * 1000
        assert compiled.choose("auto", made, policy, hour_ms, True) == (
            False,
            (f"python engine: no compiled form of {policy.name}",),
        )


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"wait_ms": lambda *_: float("nan")}, "wait_ms of Odd for a = nan"),
        ({"wait_ms": lambda *_: None}, "wait_ms of Odd for a = None"),
        ({"needs_pct": "half"}, "needs_pct of Odd = 'half'"),
        ({"needs_pct": float("nan")}, "needs_pct of Odd = nan"),
    ],
)
def test_what_a_policy_says_of_itself_is_checked(attributes, sentence):
    flat = ServiceTable(np.full((4, 100), 10.0))
    odd = type("Odd", (lab.Temporal,), attributes)()
    with pytest.raises(ValueError, match=sentence):
        lab.simulate(plan(("a", 50, lab.Replay([1]), 100.0, 4, flat)), odd, 10)

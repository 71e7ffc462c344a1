"""Lanes that are lent: the rule by hand, what a loan may never do, and what it is worth."""

import math
from dataclasses import replace

import numpy as np
import pytest
from builders import plan, table
from hypothesis import given, settings
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.policies import PeriodPlan
from dstack_lab.policies.lending import SAFE, LaneLender, beside

SHARES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)


class Halves(lab.Policy):
    """Two lanes of 50 %, lent; each is planned for batches of 4."""

    def __init__(self, drop: bool = False) -> None:
        self.drop = drop

    def reset(self, plan):
        self.keeper = LaneLender(plan, PeriodPlan(100.0, (), plan.allocations), self.drop)

    def decide(self, state):
        return self.keeper.decide(state)


def two(a: list[float], b: list[float], slo_a: float = 30, slo_b: float = 100) -> lab.Plan:
    """Two services with a lane of 50 % each; requests at these instants [ms]. A request takes 1 ms at 50 %."""
    half = table(0, 0.5, 100, batch_max=20)
    points = [("a", slo_a, lab.Replay(a), 50.0, 4, half), ("b", slo_b, lab.Replay(b), 50.0, 4, half)]
    made = plan(*points, shares=SHARES)
    return replace(made, allocations=tuple(replace(p, rate_rps=100.0) for p in made.allocations))


def log(trace):
    columns = ["start_ms", "end_ms", "service", "gpu_pct", "batch", "note"]
    return [tuple(row) for row in trace.launches[columns].itertuples(index=False)]


def run(made: lab.Plan, drop: bool = False):
    return lab.simulate(made, Halves(drop), 300)


def test_lanes_launch_whatever_waits_side_by_side():
    rows = log(run(two(a=[0, 1, 2], b=[0, 5])))
    assert rows == [
        (0, 1, "a", 50, 1, "planned"),
        (0, 1, "b", 50, 1, "planned"),
        (1, 2, "a", 50, 1, "planned"),
        (2, 3, "a", 50, 1, "planned"),
        (5, 6, "b", 50, 1, "planned"),
    ]


def test_who_would_be_late_behind_its_own_launch_borrows_an_idle_lane():
    """At 0.5 ms a's lane is taken for 20 ms; what came meanwhile would end at 1 + 20 + 15 > 31.

    b has nothing to do and could wait; it lends its lane. 60 % is not free, 40 % takes 15 · 50/40 = 18.75 ms.
    """
    burst = [0.0] * 20 + [1.0] * 15
    rows = log(run(two(a=burst, b=[60])))
    assert rows[0] == (0, 20, "a", 50, 20, "planned")
    assert rows[1] == (1, 19.75, "a", 40, 15, "opportunistic")
    assert rows[2] == (60, 61, "b", 50, 1, "planned")
    assert len(rows) == 3


def test_nobody_lends_who_could_not_serve_what_comes_meanwhile():
    """As before, but b has only 5 ms for a request. At 20 ms its own lane is free: 11 of the 15 are in time in it."""
    rows = log(run(two(a=[0.0] * 20 + [1.0] * 15, b=[60], slo_b=5)))
    assert rows[1] == (20, 31, "a", 50, 11, "planned")


def test_a_borrower_takes_the_whole_gpu_if_it_has_to():
    """20 requests need 20 ms at 50 %, and have 15: at 90 or 100 % they are in time."""
    rows = log(run(two(a=[0.0] * 20, b=[60], slo_a=15)))
    assert [row[3:] for row in rows] == [(100, 20, "opportunistic"), (50, 1, "planned")]


def test_the_oldest_are_given_up_until_the_rest_is_served_fastest():
    """Both lanes are taken until 12 ms. Then 12 of a's requests have 4.5 ms left and 8 have 14 ms.

    A batch takes 2 ms and 0.5 ms a request. As long as one of the 12 is in it, 5 fit: 5 in 4.5 ms are 1.11 a ms.
    Without them all 8 are in time: 8 in 6 ms are 1.33 a ms. On the whole GPU all 20 would take 6 ms: too long.
    """
    times = table(1, 0.25, 100, batch_max=20)
    points = [("a", 16, lab.Replay([0.0] * 20 + [0.5] * 12 + [10.0] * 8), 50.0, 4, times)]
    points += [("b", 200, lab.Replay([0.0] * 20), 50.0, 4, times)]
    made = plan(*points, shares=(50.0, 100.0))
    trace = run(made, drop=True)
    assert log(trace)[1:] == [(0, 12, "b", 50, 20, "planned"), (12, 18, "a", 50, 8, "planned")]
    given_up = trace.requests[trace.requests["outcome"] == "dropped"]
    assert given_up["arrival_ms"].tolist() == [0.5] * 12
    assert log(run(made))[2] == (12, 16.5, "a", 50, 5, "planned")  # told to drop nothing: what is in time


def test_shares_that_may_be_borrowed():
    one = plan(("a", 50, lab.Poisson(10), 50.0, 4, table()), shares=SHARES)
    assert beside(one, 50.0) == (40.0, 60.0, 100.0)
    assert beside(one, 10.0) == (20.0,)  # twice as much is the next larger one
    assert beside(one, 100.0) == (90.0,)
    assert beside(replace(one, shares=(100.0,)), 100.0) == ()


@pytest.mark.parametrize("told", [None, lab.Contention(slowdown=1e-9)], ids=["lent", "shared"])
def test_a_lane_of_a_seventh_never_idles_while_requests_wait(told):
    """Shares that six lanes hold, taken from 100 one by one, leave a hair less than the seventh."""
    share = 100 / 7
    points = [(f"s{k}", 100, lab.Poisson(70), share, 1, table(10, 0.5, 5, batch_max=8)) for k in range(7)]
    made = replace(plan(*points, shares=(share,)), contention=told)
    trace = lab.simulate(made, lab.DStack(patience=0), 2000, seed=1, contention=lab.Contention(slowdown=0))
    arrived = trace.requests.groupby("launch")["arrival_ms"].min()
    for _, mine in trace.launches.groupby("service", observed=True):
        idle_since = mine["end_ms"].shift(fill_value=0)
        assert mine["start_ms"].to_numpy() == pytest.approx(np.maximum(idle_since, mine["launch"].map(arrived)), abs=1e-5)


@pytest.mark.parametrize(
    "policy", [lab.DStack(), lab.DStack(reject=True), lab.AdaptiveDStack()], ids=lambda p: f"{p.name} {p.reject}"
)
def test_one_service_on_a_device_with_one_share(policy):
    alone = plan(("a", 50, lab.Poisson(100), 100.0, 4, table()), shares=(100.0,))
    trace = lab.simulate(alone, policy, 1000, seed=1)
    assert (trace.requests["outcome"] == "served").all()
    assert (trace.launches["gpu_pct"] == 100).all()


TIMES = st.lists(st.integers(0, 120), min_size=1, max_size=60).map(lambda ticks: [t / 2 for t in sorted(ticks)])


@settings(max_examples=150, deadline=None)
@given(a=TIMES, b=TIMES, slo_a=st.integers(5, 60), slo_b=st.integers(5, 60), reject=st.booleans())
def test_what_holds_for_every_loan(a, b, slo_a, slo_b, reject):
    """A loan is in time for the borrower; lanes and loans fit the GPU; no service runs twice at one share."""
    trace = run(two(a, b, slo_a, slo_b), reject)
    launches, requests = trace.launches, trace.requests
    slo = {"a": slo_a, "b": slo_b}
    for row in launches[launches["note"] == "opportunistic"].itertuples():
        mine = requests[requests["launch"] == row.launch]
        assert (mine["finish_ms"] - mine["arrival_ms"] <= slo[row.service] + 1e-6).all()
    for at in launches["start_ms"]:
        running = launches[(launches["start_ms"] <= at) & (launches["end_ms"] > at)]
        assert running["gpu_pct"].sum() <= 100 + 1e-6
        assert not running.duplicated(["service", "gpu_pct"]).any()
        assert running.groupby("service", observed=True).size().max() <= 2
    if not reject:
        assert (requests["outcome"] == "served").all()
    else:
        served = requests[requests["outcome"] == "served"]
        assert (served["finish_ms"] - served["arrival_ms"] <= served["service"].map(slo).astype(float) + 1e-6).all()


def test_a_lender_is_asked_for_what_will_wait():
    """b gets 100 requests/s: during a loan of 18.75 ms two come, and it waits for them no longer than its SLO."""
    assert math.ceil(0 + 0.1 * 18.75) == 2
    enough = 18.75 + SAFE * 2
    burst = [0.0] * 20 + [1.0] * 15
    for slo_b, lends in ((enough + 0.01, True), (enough - 0.01, False)):
        rows = log(run(two(a=burst, b=[60], slo_b=slo_b)))
        assert (rows[1][:2] == (1, 19.75)) is lends


@pytest.mark.parametrize(("workload", "load"), [("C-4", 0.7), ("C-7", 0.6)])
def test_lending_is_worth_it(workload, load):
    profile = lab.load_profile("v100-simulated")
    services = lab.workload(workload, profile, load=1)
    kinds = {"lends": lab.DStack(reject=True), "keeps": lab.DStack(reject=True, lend=False)}
    table = lab.compare(services, profile, kinds, (load,), seeds=(1, 2), duration_ms=3000, baseline="keeps", jobs=1)
    parts = table[table["service"] != "all"].groupby("policy", observed=True)["slo_attainment"].min()
    assert parts["lends"] > parts["keeps"]


def test_alone_near_the_bound_lanes_are_no_worse_than_turns():
    """Nothing is dropped and nobody lends: late requests must not make the batches after them small."""
    profile = lab.load_profile("v100-simulated")
    alone = lab.bound([lab.Service("vgg19", 100, lab.Poisson(1))], profile).area_pct_ms[0]
    asked = [lab.Service("vgg19", 100, lab.Poisson(0.9 * 100_000 / alone))]
    made = lab.optimize(asked, profile, overload="reject")
    lanes, turns = (lab.summary(lab.simulate(made, p, 5000, seed=1)).iloc[-1] for p in (lab.DStack(), lab.Temporal()))
    assert lanes["goodput_rps"] > turns["goodput_rps"]

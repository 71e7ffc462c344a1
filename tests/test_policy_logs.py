"""What each policy launches on an empty queue, on a burst and under overload: one small plan, logs checked by hand.

Service a takes 10 ms from 40 GPU% up, b 20 ms from 60 % up, whatever the batch (4 at most), and far too long
below; SLOs are 40 and 80 ms, the plan's batches 2, its share 60 % for both, the rates 100/s and 50/s. A log
says ``start-end service batch@GPU%``. The examples that tell policies apart are in test_baselines.py, those
of D-STACK in test_policies.py.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from builders import plan

import dstack_lab as lab
from dstack_lab.services import ServiceTable

POLICIES = {
    "Temporal": lab.Temporal(),
    "Uncontrolled": lab.Uncontrolled(),
    "Triton": lab.Triton(),
    "Clipper aimd": lab.Clipper(),
    "Clipper regression": lab.Clipper("regression"),
    "Nexus": lab.Nexus(),
    "Gslice": lab.Gslice(resize=False),
    "Gpulet": lab.Gpulet(),
    "MaxThroughput": lab.MaxThroughput(),
    "MaxMin": lab.MaxMin(),
    "Ideal": lab.Ideal(),
}

#: One request of a at 5, one of b at 100: the GPU idles between, and nobody launches an empty batch.
EMPTY = {
    "Temporal": "5-15 a1@100, 100-120 b1@100",
    "Uncontrolled": "5-15 a1@40, 100-120 b1@60",  # asked for 100, could use the knee
    "Triton": "5-15 a1@40, 100-120 b1@60",
    "Clipper aimd": "5-15 a1@100, 100-120 b1@100",
    "Clipper regression": "5-15 a1@100, 100-120 b1@100",
    "Nexus": "5-15 a1@100, 100-120 b1@100",
    "Gslice": "5-15 a1@40, 100-120 b1@60",
    "Gpulet": "5-15 a1@60, 100-120 b1@60",  # both in the partition of 60 %: the other, 40 %, is too small for b
    "MaxThroughput": "5-15 a1@60, 100-120 b1@60",
    "MaxMin": "5-15 a1@60, 100-120 b1@60",
    "Ideal": "12.5-22.5 a1@40, 115-135 b1@61",  # after a quarter of the slack: 7.5 and 15; 61 % is within 2 % of 60
}

#: One of a at 0; at 2 six more of a (due at 42) and three of b (due at 82).
BURST = {
    "Temporal": "0-10 a1@100, 10-20 a4@100, 20-30 a2@100, 30-50 b3@100",
    "Uncontrolled": "0-10 a1@40, 2-22 b3@60, 10-20 a4@40, 20-30 a2@40",
    "Triton": "0-10 a1@40, 2-22 b3@60, 10-20 a4@40, 20-30 a2@40",
    # one more after each full batch; b begins at one
    "Clipper aimd": "0-10 a1@100, 10-20 a2@100, 20-30 a3@100, 30-40 a1@100, 40-60 b1@100, 60-80 b2@100",
    # chose 2, got 1; so 3 at 10, and again until it was seen five times
    "Clipper regression": "0-10 a1@100, 10-20 a3@100, 20-30 a3@100, 30-50 b2@100, 50-70 b1@100",
    # targets of 2: 1.15 · 10 + 2/100 s fit 40 ms, 3/100 s do not; in turns, so at 60 four of a are lost
    "Nexus": "0-10 a1@100, 10-30 b2@100, 30-40 a2@100, 40-60 b1@100; a dropped 4",
    # a full 2 took 10 of 40 ms: the largest, 4, next
    "Gslice": "0-10 a1@40, 2-22 b2@60, 10-20 a2@40, 20-30 a4@40, 22-42 b1@60",
    "Gpulet": "0-10 a1@60, 10-20 a4@60, 20-30 a2@60, 30-50 b3@60",
    "MaxThroughput": "0-10 a1@60, 10-20 a2@60, 20-30 a2@60, 30-40 a2@60, 40-60 b2@60, 60-80 b1@60",
    # GPU%·ms received: a 600; b 1200; a 1200; of two alike the nearer deadline, a 1800; b 2400; a
    "MaxMin": "0-10 a1@60, 10-30 b2@60, 30-40 a2@60, 40-50 a2@60, 50-70 b1@60, 70-80 a2@60",
    # four of a are full at 2; three of b wait until 2 + 15 and take the 60 % that a leaves
    "Ideal": "2-12 a4@40, 12-22 a3@40, 17-37 b3@60",
}

#: At 0 twenty of a, of which 16 can be in time, and twelve of b, all of which can.
OVERLOAD = {
    # the last four of a are late, and b waits for them
    "Temporal": "0-10 a4@100, 10-20 a4@100, 20-30 a4@100, 30-40 a4@100, 40-50 a4@100, 50-70 b4@100, 70-90 b4@100, 90-110 b4@100",
    "Uncontrolled": "0-10 a4@40, 0-20 b4@60, 10-20 a4@40, 20-30 a4@40, 20-40 b4@60, 30-40 a4@40, 40-50 a4@40, 40-60 b4@60",
    "Triton": "0-10 a4@40, 0-20 b4@60, 10-20 a4@40, 20-30 a4@40, 20-40 b4@60, 30-40 a4@40, 40-50 a4@40, 40-60 b4@60",
    # a batch of a takes 10 ms, within its SLO, though its requests are late: the batch never shrinks
    "Clipper aimd": "0-10 a1@100, 10-20 a2@100, 20-30 a3@100, 30-40 a4@100, 40-50 a4@100, 50-60 a4@100, 60-70 a2@100, "
    "70-90 b1@100, 90-110 b2@100, 110-130 b3@100, 130-150 b4@100, 150-170 b2@100",
    # 2 is not seen five times before the budget, 9.2 ms at 30, is less than a batch takes
    "Clipper regression": "0-10 a2@100, 10-20 a2@100, 20-30 a2@100, 30-40 a2@100, 40-60 b2@100, 60-80 b2@100; "
    "a dropped 12, b dropped 8",
    # at 60 all of a is lost, at 80 the rest of b: sized for 100/s and 50/s it never takes more than 2
    "Nexus": "0-10 a2@100, 10-30 b2@100, 30-40 a2@100, 40-60 b2@100, 60-80 b2@100; a dropped 16, b dropped 6",
    "Gslice": "0-10 a2@40, 0-20 b2@60, 10-20 a4@40, 20-30 a4@40, 20-40 b4@60, 30-40 a4@40, 40-50 a4@40, 40-60 b4@60, "
    "50-60 a2@40, 60-80 b2@60",
    "Gpulet": "0-10 a4@60, 10-20 a4@60, 20-30 a4@60, 30-40 a4@60, 40-50 a4@60, 50-70 b4@60, 70-90 b4@60, 90-110 b4@60",
    # b starves until a is through
    "MaxThroughput": ", ".join(
        [f"{t}-{t + 10} a2@60" for t in range(0, 100, 10)] + [f"{t}-{t + 20} b2@60" for t in range(100, 220, 20)]
    ),
    # two of a for one of b: the same GPU%·ms
    "MaxMin": "0-10 a2@60, 10-30 b2@60, "
    + ", ".join(f"{t}-{t + 10} a2@60, {t + 10}-{t + 20} a2@60, {t + 20}-{t + 40} b2@60" for t in range(30, 190, 40))
    + ", 190-200 a2@60, 200-220 b2@60",
    # what is lost at 40 is dropped, and b is in time throughout
    "Ideal": "0-10 a4@40, 0-20 b4@60, 10-20 a4@40, 20-30 a4@40, 20-40 b4@60, 30-40 a4@40, 40-60 b4@61; a dropped 4",
}

ARRIVALS = {
    "empty queue": ([5.0], [100.0], EMPTY),
    "burst": ([0.0] + [2.0] * 6, [2.0] * 3, BURST),
    "overload": ([0.0] * 20, [0.0] * 12, OVERLOAD),
}


def from_share(share: float, ms: float) -> ServiceTable:
    """Takes `ms` from `share` GPU% up, and a hundred times as long below: its knee is `share` exactly."""
    return ServiceTable(np.full((4, 1), ms) * np.where(np.arange(1, 101) < share, 100, 1))


def asked(first: list[float], second: list[float]) -> lab.Plan:
    """Plan of the two services, sized for 100/s and 50/s, whatever comes."""
    points = (
        ("a", 40, lab.Replay(first), 60.0, 2, from_share(40, 10)),
        ("b", 80, lab.Replay(second), 60.0, 2, from_share(60, 20)),
    )
    made = plan(*points, shares=(20.0, 40.0, 60.0, 80.0, 100.0))
    rates = zip(made.allocations, (100.0, 50.0), strict=True)
    sized = tuple(lab.Allocation(p.service, p.gpu_pct, p.batch, p.service_ms, rate) for p, rate in rates)
    return lab.Plan(made.services, sized, made.tables, made.shares, made.objective, made.provenance)


def written(trace: lab.Trace) -> str:
    """Log of a trace: launches, then what was dropped."""
    columns = ["start_ms", "end_ms", "service", "batch", "gpu_pct"]
    launches = [
        f"{start:.6g}-{end:.6g} {name}{batch}@{share:.4g}"
        for start, end, name, batch, share in trace.launches[columns].itertuples(index=False)
    ]
    lost = trace.requests.loc[trace.requests["outcome"] == "dropped", "service"].value_counts()
    drops = [f"{name} dropped {lost[name]}" for name in ("a", "b") if lost[name]]
    return "; ".join(", ".join(part) for part in (launches, drops) if part)


@pytest.mark.parametrize("policy", [*dict.fromkeys(type(p) for p in POLICIES.values()), lab.DStack, lab.AdaptiveDStack])
def test_a_policy_says_what_it_is(policy):
    """Its rule and source, what it needs to know, when it wins and when it breaks."""
    said = policy.__doc__
    assert re.search(r"\*Rule\*|1\. \*Planned\*|At the end of every period", said)
    assert re.search(r"\b(19|20)\d\d\b|documented", said), "a source"
    for word in ("*Needs to know*", "*Wins*", "*Breaks*"):
        assert word in said, word


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_what_is_launched(name, arrivals):
    first, second, logs = ARRIVALS[arrivals]
    policy = POLICIES[name]
    quiet = lab.Contention(slowdown=0) if policy.oversubscribes else None  # so that turns can be checked by hand
    trace = lab.simulate(asked(first, second), policy, 150, contention=quiet)
    assert written(trace) == logs[name]
    assert (trace.requests["outcome"] != "unserved").all()

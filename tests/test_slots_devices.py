"""Slots on devices: as many workers as one service may use at once, two batches of it side by side, nothing lost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_fleet import FakeDevice
from test_copies import most_at_once
from test_standby import check
from test_standby import plan as fake_plan

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.policies.slot_plan import cut_slots


def bursts(made: lab.Plan, *arrivals: list[float]) -> lab.Plan:
    """The plan, sized for the same rates, with other requests."""
    pairs = zip(made.services, arrivals, strict=True)
    return replace(made, services=tuple(replace(s, arrivals=lab.Replay(came)) for s, came in pairs))


@pytest.mark.parametrize(
    "policy", [lab.DStack(), pytest.param(lab.AdaptiveDStack(learns=False), marks=pytest.mark.slow)], ids=lambda p: p.name
)
def test_as_many_workers_as_one_service_may_use_at_once(policy):
    """20 requests at once of batches of 8 at most: each service has a worker in every slot that it may take."""
    made = bursts(fake_plan(100, 100), [0.0] * 20, [0.0] * 20)
    slots = cut_slots(made, drop=isinstance(policy, lab.AdaptiveDStack))
    device = FakeDevice(serve_ms=20)
    trace = lab.run(made, policy, device, 300, seed=1, drain_ms=10_000)
    check(trace)
    assert policy.copies(made) == max(slots.copies) >= 2
    assert trace.events.empty
    for name, share, copies in zip(slots.services, slots.gpu_pct, slots.copies, strict=True):
        started = device.log.count(f"start {name} {share:g}")
        assert started == min(copies, math.floor(100 / share + 1e-6))
        mine = trace.launches[trace.launches["service"] == name]
        assert set(mine["gpu_pct"]) == {share}
        assert 2 <= most_at_once(mine) <= started  # 20 are more than one batch


@pytest.mark.slow
@pytest.mark.skipif(len(Cpu().slots()) < 2, reason="needs 2 cores")
def test_two_batches_of_one_network_run_at_once_on_real_cores():
    """Ten requests come at once, of batches of 4 at most: two begin before either ends, each on a core of its own."""
    names, half = ("squeezenet1_1", "shufflenet_v2_x1_0"), Cpu(Cpu().slots()[:2])
    rows = [
        {"model": m, "batch": b, "gpu_pct": g, "service_ms": 20.0 * b} for m in names for b in (1, 2, 4) for g in half.shares()
    ]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "this machine", "core sets"))
    made = lab.optimize([lab.Service(n, 2000, lab.Poisson(5)) for n in names], profile)
    made = bursts(made, [0.0] * 10 + [800.0] * 10, [400.0] * 10)
    slots = cut_slots(made, drop=False)
    assert (slots.count, slots.gpu_pct, slots.copies) == (2, (50, 50), (2, 2))
    trace = lab.run(made, lab.DStack(), half, 1500, seed=1, drain_ms=60_000)
    assert (trace.requests["outcome"] == "served").all()
    assert (trace.requests["answer"] >= 0).all()
    assert trace.requests.groupby("launch").size().tolist() == trace.launches["batch"].tolist()
    first = trace.launches[trace.launches["service"] == names[0]].iloc[:2]
    assert first["batch"].tolist() == [4, 4]
    assert most_at_once(first) == 2
    assert most_at_once(trace.launches) == 2
    assert np.isfinite(trace.requests["score"]).all()

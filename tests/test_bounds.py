"""The bounds against closed forms, plain loops, and each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import profile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dstack_lab as lab
from dstack_lab.bounds import bound_of
from dstack_lab.chrome_trace import from_trace
from dstack_lab.gpu_specs import V100
from dstack_lab.kernel_model import KernelModel, simulated_profile
from dstack_lab.kernels import of_module
from dstack_lab.services import ServiceTable
from dstack_lab.zoo import Network

PROFILE = profile(net=(1.0, 0.5, 40), other=(2.0, 1.0, 80))
SHARES = tuple(float(g) for g in range(10, 101, 10))


@dataclass(frozen=True)
class Toy:
    """Kernels of (fixed_ms, per_item_ms, knee_pct), each t = (fixed + b · item) · max(1, knee/g)."""

    kernels: tuple[tuple[float, float, float], ...]

    def kernel_ms(self, batch, gpu_pct):
        return np.array([(fixed + batch * item) * np.maximum(1, knee / gpu_pct) for fixed, item, knee in self.kernels])

    def table(self, batch_max):
        return ServiceTable(np.array([self.kernel_ms(b, np.arange(1, 101)).sum(axis=0) for b in range(1, batch_max + 1)]))


def service(model="net", slo=100.0, rate=1e6):
    return lab.Service(model, slo, lab.Poisson(rate))


def test_kernels_below_their_knee_cost_knee_times_work():
    """Any share up to its knee costs a kernel the same GPU time, knee · (fixed/b + item): least at the largest batch."""
    toy = Toy(((1.0, 0.2, 20), (0.5, 0.4, 70)))
    limit = lab.bound([service()], PROFILE, SHARES, kernels={"net": toy})
    area = 20 * (1 / 16 + 0.2) + 70 * (0.5 / 16 + 0.4)
    assert limit.area_pct_ms == pytest.approx((area,))
    assert limit.total_rps == pytest.approx(100_000 / area)
    assert limit.level == "kernel"


def test_the_slo_limits_the_batch_by_the_time_at_each_kernels_fastest_share():
    """L(b) = 1.5 + 0.6 b at best: 5 requests take 4.5 ms, 6 take 5.1."""
    toy = Toy(((1.0, 0.2, 20), (0.5, 0.4, 70)))
    limit = lab.bound([service(slo=5.0)], PROFILE, SHARES, kernels={"net": toy})
    assert limit.area_pct_ms == pytest.approx((20 * (1 / 5 + 0.2) + 70 * (0.5 / 5 + 0.4),))
    with pytest.raises(lab.InfeasiblePlan, match=r"net asks for slo_ms = 2 .* 2\.10 ms at 100 GPU%"):
        lab.bound([service(slo=2.0)], PROFILE, SHARES, kernels={"net": toy})


def test_one_kernel_alone_makes_both_levels_equal():
    toy = Toy(((1.0, 0.5, 40),))
    one = [service(slo=6.0)]
    batch = bound_of(one, [toy.table(16)], SHARES)
    assert lab.bound(one, PROFILE, SHARES, kernels={"net": toy}).area_pct_ms == pytest.approx(batch.area_pct_ms)


kernel_lists = st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 2), st.floats(1, 200)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    kernels=kernel_lists,
    slo=st.floats(1, 200),
    shares=st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True),
    rate=st.floats(1, 1e5),
)
def test_kernel_level_is_looser_and_the_minimum_of_its_definition(kernels, slo, shares, rate):
    toy, one = Toy(tuple(kernels)), [service(slo=slo, rate=rate)]
    shares = tuple(float(g) for g in sorted(shares))
    least = np.inf
    for b in range(1, 17):
        times = [[float(t) for t in row] for row in toy.kernel_ms(b, np.array(shares))]
        if sum(map(min, times)) <= slo:
            least = min(least, sum(min(g * t for g, t in zip(shares, row, strict=True)) for row in times) / b)
    if not np.isfinite(least):
        with pytest.raises(lab.InfeasiblePlan, match="net asks for"):
            lab.bound(one, PROFILE, shares, kernels={"net": toy})
        return
    loose = lab.bound(one, PROFILE, shares, kernels={"net": toy})
    assert loose.area_pct_ms == pytest.approx((least,))
    assert loose.total_rps == pytest.approx(min(rate, 100_000 / least))
    try:
        tight = bound_of(one, [toy.table(16)], shares)
    except lab.InfeasiblePlan:
        return  # no batch has one share at which all its kernels are fast enough
    assert loose.area_pct_ms[0] <= tight.area_pct_ms[0] * (1 + 1e-9)
    assert loose.total_rps >= tight.total_rps * (1 - 1e-9)


def uneven_network() -> Network:
    """A convolution that fills the GPU, then layers that fill a few SMs."""
    wide = nn.Sequential(nn.Conv2d(3, 64, 7, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(wide, *(nn.Linear(64, 64) for _ in range(20)))
    return Network("net", net.to("meta"), lambda batch: (torch.empty(batch, 3, 224, 224, device="meta"),))


@pytest.mark.parametrize(("slo", "gained"), [(1.0, 0.3), (3.0, 0.02), (10.0, 0.0), (100.0, 0.0)])
def test_a_simulated_profile_and_its_own_kernels(slo, gained):
    """A tight SLO asks all kernels of a launch for a share that few of them use; at a loose one all are cheapest at the least."""
    net = uneven_network()
    model = KernelModel(of_module(net.module, net.example, net.name), V100)
    made = simulated_profile(V100, [net], batches=(1, 2, 4, 8, 16), shares=SHARES)
    table = ServiceTable(np.array(model.predict(np.arange(1, 17)[:, None], np.arange(1, 101)[None, :])))
    one = [service(slo=slo)]
    kernel, exact = lab.bound(one, made, kernels={"net": model}), bound_of(one, [table], SHARES)
    assert kernel.total_rps >= (1 + gained) * exact.total_rps * (1 - 1e-9)
    assert lab.bound(one, made).total_rps == pytest.approx(exact.total_rps, rel=0.01)  # rounded and fitted


def test_the_batch_level_by_hand():
    """At 40 GPU% and below a request of a batch of 16 costs 40 · (1/16 + 0.5)."""
    two = [service(rate=2000.0), service("other", rate=1000.0)]
    tables = [Toy(((1.0, 0.5, 40),)).table(16), Toy(((2.0, 1.0, 80),)).table(16)]
    limit = bound_of(two, tables, SHARES)
    cheap, dear = 40 * (1 / 16 + 0.5), 80 * (2 / 16 + 1)
    assert limit.area_pct_ms == pytest.approx((cheap, dear))
    assert limit.rates_rps == pytest.approx({"net": 2000, "other": (100_000 - 2000 * cheap) / dear})
    frame = limit.to_frame()
    assert frame["service"].tolist() == ["net", "other", "all"]
    assert frame["bound_rps"].iloc[-1] == pytest.approx(limit.total_rps)
    assert limit.level == "batch"


@pytest.mark.parametrize("slo", [2.0, 10.0, 100.0])
def test_more_shares_only_loosen_a_bound(slo):
    toy, last = Toy(((1.0, 0.2, 20), (0.5, 0.4, 70))), np.inf
    for shares in ((30.0, 100.0), (20.0, 30.0, 70.0, 100.0), tuple(range(1, 101))):
        area = bound_of([service(slo=slo)], [toy.table(16)], shares).area_pct_ms[0] if slo > 2.1 else np.inf
        assert area <= last
        last = area


def device(*shares):
    return SimpleNamespace(shares=lambda: shares)


def test_a_device_says_what_can_be_granted():
    one = [service()]
    assert lab.bound(one, PROFILE, device=device(30, 60)) == lab.bound(one, PROFILE, [30, 60])
    assert lab.bound(one, PROFILE, [60], device=device(30, 60)) == lab.bound(one, PROFILE, [60])
    assert lab.bound(one, PROFILE, device=device(0.5, 60)) == lab.bound(one, PROFILE, [60])  # nothing is profiled below 1 %
    assert lab.bound(one, PROFILE, device=lab.devices.Cpu()) == lab.bound(one, PROFILE, lab.devices.Cpu().shares())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": []}, r"shares = \(\): must be 1 or more GPU% from 1 to 100"),
        ({"shares": [50, 0]}, "shares = 0: must be a GPU% from 1 to 100"),
        ({"shares": [101]}, "shares = 101: must be a GPU% from 1 to 100"),
        ({"shares": [float("nan")]}, "shares = nan: must be a GPU% from 1 to 100"),
        ({"shares": ["50"]}, "shares = '50': must be a GPU% from 1 to 100"),
        ({"shares": 50}, "shares = 50: must be an iterable of GPU% from 1 to 100"),
        ({"shares": [33], "device": device(30, 60)}, r"shares = 33\.0: must be granted by the device: one of 30, 60"),
        ({"device": device()}, r"device\.shares\(\) = \(\): must be 1 or more GPU%"),
        ({"device": device(120)}, r"device\.shares\(\) = 120: must be a GPU% from 1 to 100"),
        ({"device": device(float("nan"))}, r"device\.shares\(\) = nan: must be"),
        ({"device": lab.devices.Cpu}, r"device = .*: must be a device: an object whose shares\(\)"),
        ({"device": "cpu"}, "device = 'cpu': must be a device"),
        ({"kernels": {}}, r"kernels = \[\]: must be a mapping that holds net"),
        ({"kernels": [1]}, r"kernels = \[1\]: must be a dict of model name to KernelModel"),
        ({"kernels": {"net": 3}}, r"kernels\['net'\] = 3: must be a KernelModel"),
        ({"services": 3}, "services = 3: must be an iterable of Service"),
        ({"profile": "v100"}, "profile = 'v100': must be a Profile"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.bound(**{"services": [service()], "profile": PROFILE, **arguments})


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.ones(10), r"shape of kernel_ms of net at batch 1 = \(10,\): must be \(kernels, 10\)"),
        (np.ones((2, 3)), r"shape of kernel_ms of net at batch 1 = \(2, 3\): must be \(kernels, 10\)"),
        (np.full((2, 10), np.nan), "kernel_ms of net at batch 1 = nan: must be finite, 0 or more"),
        (np.full((2, 10), np.inf), "kernel_ms of net at batch 1 = inf: must be"),
        (np.full((2, 10), -1.0), r"kernel_ms of net at batch 1 = -1\.0: must be"),
    ],
)
def test_kernel_times_that_are_none(times, message):
    broken = SimpleNamespace(kernel_ms=lambda batch, gpu_pct: times)
    with pytest.raises(ValueError, match=message):
        lab.bound([service()], PROFILE, kernels={"net": broken})


def test_a_measured_trace_knows_one_batch_and_proves_nothing():
    events = [
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 10 * i, "dur": 5, "args": {"grid": [160, 1, 1], "block": [128, 1, 1]}}
        for i in range(3)
    ]
    measured = KernelModel(from_trace({"traceEvents": events}, batch=4), V100)
    with pytest.raises(ValueError, match="batch = 1: must be 4, the batch of the trace"):
        lab.bound([service()], PROFILE, kernels={"net": measured})


def test_several_services_of_one_model_share_its_kernels():
    asked = []

    class Counting(Toy):
        def kernel_ms(self, batch, gpu_pct):
            asked.append(batch)
            return super().kernel_ms(batch, gpu_pct)

    toy = Counting(((1.0, 0.5, 40),))
    two = [lab.Service("net", slo, lab.Poisson(100), name) for name, slo in (("a", 3), ("b", 300))]
    limit = lab.bound(two, PROFILE, SHARES, kernels={"net": toy})
    assert asked == list(range(1, 17))
    assert limit.area_pct_ms == pytest.approx((40 * (1 / 4 + 0.5), 40 * (1 / 16 + 0.5)))
    assert list(itertools.chain(limit.rates_rps)) == ["a", "b"]

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED, plan, table
from hypothesis import given
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.metrics import gpu_time, utilization


def by_hand() -> lab.Trace:
    """Two services: a (SLO 10 ms) served at 5, 10 and 12 ms after arrival and once not; b (SLO 100) dropped once."""
    services = pd.DataFrame({"service": ["a", "b"], "model": ["a", "b"], "slo_ms": [10.0, 100.0], "rate_rps": [4.0, 1.0]})
    requests = pd.DataFrame(
        {
            "service": pd.Categorical(["a"] * 4 + ["b"], ["a", "b"]),
            "arrival_ms": [0.0, 100.0, 200.0, 300.0, 400.0],
            "start_ms": [0.0, 100.0, 205.0, np.nan, np.nan],
            "finish_ms": [5.0, 110.0, 212.0, np.nan, np.nan],
            "launch": [0, 1, 2, -1, -1],
            "outcome": pd.Categorical(["served"] * 3 + ["unserved", "dropped"], ["served", "dropped", "unserved"]),
        }
    )
    launches = pd.DataFrame(
        {
            "launch": [0, 1, 2],
            "service": pd.Categorical(["a"] * 3, ["a", "b"]),
            "start_ms": [0.0, 100.0, 205.0],
            "end_ms": [5.0, 110.0, 212.0],
            "gpu_pct": [100.0, 50.0, 20.0],
            "batch": [1, 1, 1],
            "knee_pct": [40.0, 40.0, 40.0],
            "note": ["", "", ""],
        }
    )
    return lab.Trace(services, requests, launches, 1000.0, "Hand", 0, SIMULATED)


def test_every_number_by_hand():
    table = lab.summary(by_hand()).set_index("service")
    a = table.loc["a"]
    assert (a["throughput_rps"], a["goodput_rps"], a["slo_attainment"]) == (3, 2, 0.5)
    assert a["p50_ms"] == 10
    assert a["p99_ms"] == pytest.approx(np.quantile([5, 10, 12], 0.99))
    # min(GPU%, knee): 40 % for 5 ms, 40 % for 10 ms, 20 % for 7 ms, of 1000 ms
    assert a["utilization"] == pytest.approx((0.4 * 5 + 0.4 * 10 + 0.2 * 7) / 1000)
    assert (a["dropped"], a["unserved"], table.loc["b", "dropped"]) == (0, 1, 1)
    assert np.isnan(table.loc["b", "p50_ms"])  # nothing was served: missing, not zero
    assert table.loc["all", "slo_attainment"] == 0.4
    assert gpu_time(by_hand())["a"] == 5 * 100 + 10 * 50 + 7 * 20


def test_warm_up_is_left_out():
    late = lab.summary(by_hand(), warm_up_ms=150).set_index("service").loc["a"]
    assert late["throughput_rps"] == pytest.approx(1 / 0.85)
    assert late["utilization"] == pytest.approx(0.2 * 7 / 850)
    with pytest.raises(ValueError, match="trace = None: must be a Trace"):
        lab.summary(None)
    with pytest.raises(ValueError, match="warm_up_ms = 1000"):
        lab.summary(by_hand(), warm_up_ms=1000)


def test_utilization_never_counts_beyond_the_end_or_the_whole_gpu():
    crowd = plan(*[(f"s{i}", 50, lab.Poisson(900), 50.0, 4, table(1, 1, 50)) for i in range(3)])
    trace = lab.simulate(crowd, lab.DStack(reject=True), 1000, seed=1)
    assert 0.8 < utilization(trace).sum() <= 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_jain_lies_between_one_over_n_and_one(shares):
    index = lab.jain(shares)
    assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9


def test_jain_of_known_cases():
    assert lab.jain([3, 3, 3]) == 1
    assert lab.jain([1, 0, 0, 0]) == 0.25
    assert lab.jain([1, 2]) == pytest.approx(9 / 10)
    for bad in ([], [-1, 2]):
        with pytest.raises(ValueError, match="shares"):
            lab.jain(bad)

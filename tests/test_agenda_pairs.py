"""Networks beside each other: what is kept of a common window, and constants that are known."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from test_agenda import command

import dstack_lab as lab
from dstack_lab.agenda import pairs
from dstack_lab.agenda.interference import fitted, slowdowns
from dstack_lab.contention import Load
from dstack_lab.services import ServiceTable

#: Time alone [ms] at 50 %, by network and batch.
ALONE = {("a", 1): 1.0, ("a", 16): 5.0, ("b", 1): 2.5, ("b", 16): 30.0, ("c", 1): 0.7, ("c", 16): 8.0}


def recorded(truth: lab.Contention, noise: float = 0.0) -> pd.DataFrame:
    """A table as item pairs writes it, with slowdowns that `Contention` itself says."""
    rng = np.random.default_rng(1)
    head = {"mechanism": "mps", "gpu_pct": 50.0}
    rows = [
        {**head, "sharing": "alone", "model": m, "batch": b, "beside": "", "beside_batch": 0, "beside_pct": 0.0, "service_ms": ms}
        for (m, b), ms in ALONE.items()
    ]
    for first, second in [(x, y) for x in ALONE for y in ALONE if x[0] < y[0]]:
        loads = [Load(ServiceTable(np.full((1, 100), ALONE[x])), 1, 50.0, ALONE[x], 50.0) for x in (first, second)]
        for (x, y), stretch in zip(((first, second), (second, first)), truth.stretch(loads), strict=True):
            more = (stretch - 1) * (1 + noise * rng.standard_normal())
            beside = {"beside": y[0], "beside_batch": y[1], "beside_pct": 50.0, "service_ms": ALONE[x] * (1 + more)}
            rows.append({**head, "sharing": "shares", "model": x[0], "batch": x[1], **beside})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("slowdown", "exponent"), [(0.096, 0.1), (0.3, 0.5), (0.02, 0.0), (0.1, 1.0)])
def test_known_constants_are_found_again(slowdown, exponent):
    found = fitted(recorded(lab.Contention(slowdown, exponent)))
    assert found.contention.slowdown == pytest.approx(slowdown, rel=1e-3)
    assert found.contention.exponent == pytest.approx(exponent, abs=1e-3)
    assert found.sides == 24
    assert found.error < 1e-4
    assert found.constant_error == pytest.approx(0, abs=1e-6) if exponent == 0 else found.constant_error > found.error


def test_noise_and_a_spoilt_pair_move_them_little():
    table = recorded(lab.Contention(0.2, 0.4), noise=0.05)
    table.loc[table.index[-1], "service_ms"] *= 5
    found = fitted(table).contention
    assert found.slowdown == pytest.approx(0.2, rel=0.1)
    assert found.exponent == pytest.approx(0.4, abs=0.1)


def test_what_costs_nothing_has_no_exponent():
    found = fitted(recorded(lab.Contention(0.0, 0.7))).contention
    assert (found.slowdown, found.exponent) == (0, 0)
    table = recorded(lab.Contention(0.1, 0.0))
    table.loc[table["sharing"] == "shares", "service_ms"] *= 0.9  # faster beside each other: noise
    assert fitted(table).contention.slowdown == 0


def test_networks_equally_long_say_nothing_about_the_exponent():
    table = recorded(lab.Contention(0.1, 0.0))
    table["service_ms"] = np.where(table["sharing"] == "alone", 4.0, 4.4)
    found = fitted(table).contention
    assert (found.slowdown, found.exponent) == (pytest.approx(0.1), 0)


def test_a_slowdown_is_over_the_side_s_own_time_alone():
    table = recorded(lab.Contention(0.1, 0.0))
    table.loc[(table["model"] == "c") & (table["sharing"] == "alone") & (table["batch"] == 1), "service_ms"] = np.nan
    sides = slowdowns(table)
    assert len(sides) == 24 - 8  # those of c at batch 1 (4), and beside it (4)
    assert sides["slowdown"].to_numpy() == pytest.approx(1.1)
    with pytest.raises(ValueError, match="sides of pairs on disjoint shares = 0: must be 1 or more"):
        fitted(table[table["sharing"] == "alone"])
    with pytest.raises(ValueError, match="rows alone"):
        slowdowns(pd.concat([table, table]))


def test_head_and_tail_of_the_common_time_are_left_out():
    """The other ends at 100 ms: of 20 batches of 10 ms those within 20 and 85 ms count; of 4 of 25 the second and third."""
    first, second = pairs.inner([np.full(20, 10.0), np.array([25.0, 26, 24, 25])])
    assert first.tolist() == [10.0] * 6
    assert second.tolist() == [26, 24]
    assert pairs.inner([np.full(20, 10.0), np.array([100.0])])[1].size == 0  # was alone for a part of it


@pytest.mark.parametrize(
    ("grid", "wanted", "found"),
    [
        ((25.0, 50.0, 75.0, 100.0), (50, 25, 75), [(50, 50), (25, 75), (75, 25)]),
        ((6.06, 24.24, 30.3, 48.48, 54.54, 72.72, 78.78, 100.0), (50, 25), [(48.48, 48.48), (24.24, 72.72)]),
        ((33.33, 66.67, 100.0), (50, 25, 75), [(33.33, 66.67), (66.67, 33.33)]),
        ((100.0,), (50,), []),
    ],
)
def test_complementary_shares_are_those_the_device_has(grid, wanted, found):
    assert pairs.split(grid, wanted) == found


@pytest.mark.slow
def test_pairs_on_this_machine_s_cores(tmp_path):
    said = command(tmp_path, "pairs", "--device", "cpu")
    kept = json.loads((tmp_path / "pairs" / "cpu.json").read_text())
    assert (kept["complete"], kept["failed"]) == (True, [])
    table = pd.read_csv(tmp_path / "pairs" / "cpu-pairs.csv")
    if (table["sharing"] == "shares").any():  # one core has no complementary shares
        sides = table[table["sharing"] == "shares"]
        assert len(sides) == 4
        assert set(zip(sides["model"], sides["beside"], strict=True)) == {pairs.CPU_MODELS, pairs.CPU_MODELS[::-1]}
        assert kept["steps"][sides["step"].iloc[0]]["value"]["skew_ms"] < 100
        assert "cpu: Contention(slowdown=" in said or "nothing fitted" in said

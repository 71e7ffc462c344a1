"""Changes of a share: found in a log written by hand, in simulated runs, and in a real one."""

from __future__ import annotations

import json

import builders
import numpy as np
import pandas as pd
import pytest
from test_agenda import command

import dstack_lab as lab
from dstack_lab.agenda import resize

SERVICES = pd.DataFrame({"service": ["a", "b"], "model": ["a", "b"], "slo_ms": [15.0, 15.0], "rate_rps": [1.0, 1.0]})


def log(launches, arrivals):
    """Trace of service a from (start, end, share, worker_ms) and, for each launch, the arrivals it served; b disturbs."""
    runs = [
        {"launch": i, "service": "a", "start_ms": start, "end_ms": end, "gpu_pct": share, "batch": len(served)}
        | {"knee_pct": 50.0, "note": "", "worker_ms": worker}
        for i, ((start, end, share, worker), served) in enumerate(zip(launches, arrivals, strict=True))
    ]
    runs.append({**runs[0], "launch": 99, "service": "b", "gpu_pct": 10.0, "start_ms": 15.0, "end_ms": 16.0})
    requests = [
        {
            "service": "a",
            "arrival_ms": t,
            "start_ms": run["start_ms"],
            "finish_ms": run["end_ms"],
            "launch": i,
            "outcome": "served",
        }
        for i, (run, served) in enumerate(zip(runs, arrivals, strict=False))
        for t in served
    ]
    origin = lab.Provenance("measured", "a log", "by hand")
    return lab.Trace(SERVICES, pd.DataFrame(requests), pd.DataFrame(runs), 2000.0, "Resizes", 0, origin)


def test_gaps_and_late_requests_of_a_log_written_by_hand():
    trace = log(
        [(0, 10, 40, 9.5), (10.1, 20, 40, 9.5), (20.5, 40, 60, 18), (1000, 1010, 60, 9.5), (1011, 1030, 40, 17)],
        [[0.0], [5.0], [11.0, 12.0, 30.0 - 10], [1000.0 - 0.02], [1010.5]],
    )
    table = resize.switches(trace, "a", [18.0, 900.0])
    assert table["asked_ms"].tolist() == [18, 900]
    assert table[["from_pct", "to_pct"]].to_numpy().tolist() == [[40, 60], [60, 40]]
    assert table["delay_ms"].to_numpy() == pytest.approx([2.5, 111])
    assert table["gap_us"].to_numpy() == pytest.approx([500, 500])  # since the launch before; since the request came
    assert table["usual_gap_us"].to_numpy() == pytest.approx([60, 60])  # of 0 (first), 100 and 20: the first has none before it
    assert table["dispatch_us"].to_numpy() == pytest.approx([1500, 2000])
    assert table["usual_dispatch_us"].to_numpy() == pytest.approx([500, 500])
    assert table["requests"].tolist() == [1, 2]  # at 20; at 999.98 and 1010.5
    assert table["late"].tolist() == [1, 1]
    assert table["usual_late"].to_numpy() == pytest.approx([2 / 4] * 2)  # those at 11 and 12 of 0, 5, 11, 12


def test_without_a_switch_there_is_no_row_and_what_was_never_served_is_late():
    steady = log([(0, 10, 40, 9), (10, 20, 40, 9)], [[0.0], [1.0]])
    assert resize.switches(steady, "a", [5.0]).empty
    lost = log([(0, 10, 40, 9), (10, 20, 60, 9)], [[0.0], [6.0]])
    lost.requests.loc[1, ["finish_ms"]] = np.nan
    assert resize.switches(lost, "a", [5.0])["late"].item() == 1


def test_in_a_simulated_run_every_change_is_at_the_next_launch_and_nobody_waits():
    plan = builders.plan(("a", 60, lab.Poisson(300), 40.0, 8, builders.table()), shares=(40.0, 60.0))
    times = [200.0, 400.0, 600.0]
    table = resize.switches(lab.simulate(plan, resize.Resizes(40.0, 60.0, times), 1000, seed=3), "a", times)
    assert table["asked_ms"].tolist() == times
    assert table["to_pct"].tolist() == [60, 40, 60]
    assert (table["delay_ms"] >= 0).all()
    assert table["gap_us"].to_numpy() == pytest.approx(0, abs=1e-3)
    assert table["dispatch_us"].isna().all()
    assert table["late"].sum() == 0


@pytest.mark.parametrize(
    ("grid", "both"),
    [
        ((50.0, 100.0), (50, 100)),
        ((25.0, 50.0, 75.0, 100.0), (50, 75)),
        ((36.36, 42.42, 54.54, 60.6, 100.0), (42.42, 60.6)),
    ],
)
def test_two_different_shares_are_found(grid, both):
    assert resize.near(grid) == both


def test_one_share_cannot_be_resized():
    with pytest.raises(ValueError, match="2 or more: with one, nothing can be resized"):
        resize.near((100.0,))


def test_standbys_are_asked_for_only_where_they_are_measured():
    plan = builders.plan(("a", 60, lab.Poisson(300), 40.0, 8, builders.table()), shares=(40.0, 60.0))
    for ahead, first in ((True, (40.0, 60.0)), (False, (40.0,))):
        policy = resize.Resizes(40.0, 60.0, [5.0], ahead)
        assert policy.shares(plan) == {"a": (40.0, 60.0)}
        assert policy.first_shares(plan) == {"a": first}


@pytest.mark.slow
@pytest.mark.skipif(len(lab.devices.Cpu().shares()) < 2, reason="one core: nothing can be resized")
def test_core_sets_are_switched_under_load(tmp_path):
    command(tmp_path, "resize", "--device", "cpu")
    kept = json.loads((tmp_path / "resize" / "cpu.json").read_text())
    assert (kept["complete"], kept["failed"]) == (True, [])
    table = pd.read_csv(tmp_path / "resize" / "cpu-switches.csv")
    assert 1 <= len(table) <= 4
    assert (table["from_pct"] != table["to_pct"]).all()
    assert table[["gap_us", "usual_gap_us", "dispatch_us", "usual_late"]].notna().all(axis=None)

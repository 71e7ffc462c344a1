from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED, plan, table

import dstack_lab as lab
from dstack_lab.traces import LAUNCHES, REQUESTS


@pytest.fixture(scope="module")
def trace() -> lab.Trace:
    both = plan(("a", 50, lab.Poisson(200), 50.0, 4, table()), ("b", 80, lab.Gamma(100, 2), 50.0, 8, table(2, 1)))
    return lab.simulate(both, lab.DStack(), 2000, seed=1)


def test_save_and_load_give_the_same_trace(trace, tmp_path):
    path = trace.save(tmp_path / "run")
    assert path.name == "run.npz"
    loaded = lab.load_trace(path)
    for name in ("services", "requests", "launches", "events"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(trace, name), check_dtype=False, check_categorical=False)
    assert (loaded.duration_ms, loaded.policy, loaded.seed, loaded.provenance) == (2000, "DStack", 1, trace.provenance)
    pd.testing.assert_frame_equal(lab.summary(loaded), lab.summary(trace))


def test_schema(trace):
    assert tuple(trace.requests.columns) == REQUESTS
    assert tuple(trace.launches.columns) == LAUNCHES


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing part", "other format"])
def test_a_damaged_file_is_refused_by_name(trace, tmp_path, damage):
    path = trace.save(tmp_path / "run.npz")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    else:
        with np.load(path) as data:
            parts = dict(data)
        if damage == "missing part":
            del parts["head"]
        else:
            parts["head"] = np.array(json.dumps({"format": "something else"}))
        np.savez_compressed(path, **parts)
    with pytest.raises(ValueError, match=r"trace run\.npz: must be a whole file"):
        lab.load_trace(path)


def test_a_missing_column_or_file_is_named(trace, tmp_path):
    with pytest.raises(ValueError, match="launches columns"):
        lab.Trace(trace.services, trace.requests, trace.launches.drop(columns="batch"), 10.0, "P", 0, SIMULATED)
    with pytest.raises(ValueError, match="must be an existing"):
        lab.load_trace(tmp_path / "none.npz")


def test_nothing_half_written_stays_when_writing_fails(trace, tmp_path, monkeypatch):
    trace.save(tmp_path / "run")
    before = (tmp_path / "run.npz").read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trace.save(tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    assert (tmp_path / "run.npz").read_bytes() == before


def test_chrome_trace_holds_every_launch_in_microseconds(trace, tmp_path):
    record = json.loads(trace.to_chrome(tmp_path / "run.json").read_text())
    events = record["traceEvents"]
    assert len(events) == len(trace.launches)
    assert sum(e["dur"] for e in events) == pytest.approx(1000 * (trace.launches["end_ms"] - trace.launches["start_ms"]).sum())
    assert {e["tid"] for e in events} >= {"a", "b"}
    assert "simulated" in record["otherData"]["provenance"]


def test_a_trace_takes_at_most_100_bytes_a_request(trace):
    both = plan(("a", 50, lab.Poisson(2000), 50.0, 4, table(0.1, 0.1)), ("b", 80, lab.Poisson(1000), 50.0, 8, table(0.1, 0.1)))
    big = lab.simulate(both, lab.DStack(), 20_000, seed=1)
    size = sum(frame.memory_usage(deep=True, index=False).sum() for frame in (big.requests, big.launches))
    assert size / len(big.requests) < 100

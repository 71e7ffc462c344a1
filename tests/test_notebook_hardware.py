"""Notebooks 08 and 09 where hardware is: policies name the shares they use, and what a GPU recorded is found and shown."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

import dstack_lab as lab

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "09_real_hardware.ipynb"
ERROR = -0.25


@pytest.fixture(scope="module")
def cells():
    """Sources from the first cell that looks for records on, with the imports."""
    sources = [
        "".join(c["source"]) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"
    ]
    wanted = [source for source in sources if "recorded" in source or "on_gpu" in source]
    return [sources[0], *(source for source in wanted if "exercises" not in source and "recording" not in source)]


@pytest.fixture(scope="module")
def profile():
    return lab.load_profile("v100-simulated")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose notebooks are run from their own folder."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def run(cells):
    """Names that the cells leave behind."""
    names = {}
    for source in cells:
        exec(source, names)
    return names


def test_nothing_recorded_is_said(cells, checkout, capsys):
    assert run(cells)["on_gpu"].empty
    said = capsys.readouterr().out
    assert said.count("nothing recorded") == 6
    assert "measured: 0 runs on a GPU, nothing to compare with" in said


def test_what_is_recorded_is_shown_beside_its_simulation(cells, checkout, capsys, profile):
    plan = lab.optimize(lab.workload("C-2", profile, load=0.4), profile)
    trace = lab.simulate(plan, lab.Temporal(), 1_000, seed=1)
    table = lab.validate(trace, profile, lab.Temporal(), plan)
    table.loc[table["service"] == "all", "p99_ms_error"] = ERROR
    folder = checkout / "data" / "recorded" / "multiplex"
    folder.mkdir(parents=True)
    head = {"mechanism": "mps", "workload": "C-2", "load": 0.4, "policy": "Temporal"}
    pd.concat([table.assign(**head), table.assign(**{**head, "mechanism": "green"})]).to_csv(
        folder / "h200-runs.csv", index=False
    )
    record = {"calls": [{"date": "2026-12-01"}], "complete": True, "failed": []}
    (folder / "h200.json").write_text(json.dumps(record), encoding="utf-8")
    shown = run(cells)["on_gpu"]
    assert shown[["gpu", "mechanism"]].to_numpy().tolist() == [["h200", "mps"], ["h200", "green"]]
    whole = table[table["service"] == "all"].iloc[0]
    assert shown["p99_ms"].tolist() == [round(whole["p99_ms"], 3)] * 2
    said = capsys.readouterr().out
    assert "multiplex  h200         2026-12-01 complete" in said
    assert "measured: 2 runs on a GPU, p99 off by up to 25%" in said


def test_the_policies_of_notebook_08_launch_at_shares_they_named(profile):
    """A real device has workers for those only; which share a plan has depends on what was measured."""
    path = NOTEBOOK.with_name("08_own_policy.ipynb")
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names = run([cell for cell in cells if cell.startswith(("import", "class")) and "TooMuch" not in cell])
    services = [lab.Service(model, 100, lab.Poisson(20)) for model in ("resnet50", "vgg19")]
    for share in (50.0, 100.0):
        plan = lab.optimize(services, profile, shares=[50.0, 100.0])
        plan = dataclasses.replace(plan, allocations=tuple(at(plan, i, share) for i in range(2)))
        for kind in ("Fifo", "Lanes", "Shedding"):
            policy = names[kind]()
            trace = lab.simulate(plan, policy, 2_000, seed=1)
            used = trace.launches.groupby("service", observed=True)["gpu_pct"].agg(set)
            assert all(used[name] <= set(shares) for name, shares in policy.shares(plan).items())


def at(plan, i, share):
    """Allocation of a service, moved to a share."""
    old = plan.allocations[i]
    return dataclasses.replace(old, gpu_pct=share, service_ms=float(plan.tables[i].at(old.batch, share)))

"""The measuring agenda without a GPU: records that survive everything, and the whole path on cores and on stand-ins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import builders
import pandas as pd
import pytest
from test_green import stub  # noqa: F401

import dstack_lab as lab
from dstack_lab.agenda import ITEMS, interference, keep_profile, multiplex, perform, silicon, ticks
from dstack_lab.agenda.ahead import Ahead
from dstack_lab.agenda.pages import markdown
from dstack_lab.agenda.record import OutOfTime, Record, Step
from dstack_lab.agenda.target import Target, short_name
from dstack_lab.recipes import recipe_of
from dstack_lab.workloads import WORKLOADS, load_of

ROOT = Path(__file__).parents[1]
FAKES = ROOT / "tests" / "fakes"
#: What torch says here, as it was built.
NO_GPU = re.compile("built without CUDA|finds no GPU")
HERE = lab.Provenance("measured", "this machine", "core sets", {"torch": "2.11.0"}, "2026-01-02")


def record(tmp_path, **options):
    return Record("knee", tmp_path, "h200", HERE, **options)


def boom():
    raise RuntimeError("broken")


def test_a_failure_does_not_lose_the_rest_and_is_tried_once_more(tmp_path):
    first, ran = record(tmp_path), []
    steps = [Step("a", lambda: 1), Step("b", boom), Step("c", lambda: ran.append("c") or {"x": 2})]
    first.run(steps)
    assert (first.names("done"), first.names("failed")) == (["a", "c"], ["b"])
    kept = json.loads(first.path.read_text())
    assert (kept["complete"], kept["left"], kept["failed"]) == (False, ["b"], ["b"])
    assert kept["steps"]["b"]["error"] == "RuntimeError: broken"
    assert "boom" in kept["steps"]["b"]["where"]
    second = record(tmp_path)
    second.run([Step("a", lambda: ran.append("a")), Step("b", lambda: 3), Step("c", boom)])
    assert ran == ["c"]  # what was done is not done again
    assert second.value("b") == 3
    assert json.loads(second.path.read_text())["complete"]
    assert len(second.calls) == 2


def test_what_fails_twice_is_given_up_and_says_so(tmp_path):
    for _ in range(3):
        tried = record(tmp_path)
        tried.run([Step("b", boom)])
    assert tried.steps["b"]["tries"] == 2
    assert json.loads(tried.path.read_text())["complete"]
    assert "1 failed (b)" in tried.summary()


def test_fresh_steps_go_before_those_that_failed(tmp_path):
    record(tmp_path).run([Step("b", boom)])
    ran = []
    record(tmp_path).run([Step("b", lambda: ran.append("b")), Step("d", lambda: ran.append("d"))])
    assert ran == ["d", "b"]


def test_the_time_of_a_call_is_kept(tmp_path):
    ran, short = [], record(tmp_path, minutes=0.5 / 60)
    short.run([Step("slow", lambda: time.sleep(30), 0), Step("next", lambda: ran.append(1), 0.2)])
    assert short.begin_s + 5 > time.monotonic()
    assert short.names("left") == ["slow", "next"]
    assert ran == []
    assert "2 left (slow, next): call again" in short.summary()


def test_a_step_cannot_swallow_the_end_of_the_time():
    assert not issubclass(OutOfTime, Exception)


def test_rows_of_a_second_try_replace_those_of_the_first(tmp_path):
    kept = record(tmp_path)
    kept.add("t", pd.DataFrame({"x": [1, 2]}), "a")
    kept.add("t", pd.DataFrame({"x": [3]}), "b")
    kept.add("t", pd.DataFrame({"x": [4]}), "a")
    assert kept.table("t").to_dict("list") == {"x": [3, 4], "step": ["b", "a"]}


def test_files_are_packed_into_one_that_does_not_grow_too_large(tmp_path, capsys):
    kept = record(tmp_path)
    assert kept.pack("traces", "b", b"old")
    assert kept.pack("traces", "a", b"x")
    assert kept.pack("traces", "b", b"new")
    assert not kept.pack("traces", "c", bytes(13 << 20))
    assert "c is not kept: h200-traces.zip would pass 12 MiB" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "knee" / "h200-traces.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"a": b"x", "b": b"new"}
    again = record(tmp_path / "new", resume=tmp_path)
    assert not (again.folder / "h200-traces.zip").exists()  # there is no record to go on from yet
    kept.run([Step("a", lambda: 1)])
    assert (record(tmp_path / "new", resume=tmp_path).folder / "h200-traces.zip").exists()


def test_what_cannot_be_had_here_is_booked_once_and_forgotten_when_it_can(tmp_path):
    first = record(tmp_path)
    first.refuse({"mps": "MpsError: no programs"})
    first.run([Step("green a", lambda: 1)])
    kept = json.loads(first.path.read_text())
    assert (kept["complete"], kept["failed"], kept["steps"]["mps"]["error"]) == (True, ["mps"], "MpsError: no programs")
    second = record(tmp_path)
    second.refuse({})
    second.run([Step("green a", boom)])
    assert (second.names("done"), second.names("failed")) == (["green a"], [])


def test_another_folder_is_gone_on_from_only_on_the_same_machine(tmp_path, capsys):
    old = record(tmp_path / "old")
    old.run([Step("a", lambda: 1)])
    old.add("mps", pd.DataFrame({"x": [1]}), "a")
    new = record(tmp_path / "new", resume=tmp_path / "old")
    assert (new.value("a"), len(new.table("mps"))) == (1, 1)
    newer = lab.Provenance("measured", "this machine", "core sets", {"torch": "2.12.0"})
    other = Record("knee", tmp_path / "other", "h200", newer, resume=tmp_path / "old")
    assert (other.steps, "not resumed" in capsys.readouterr().out) == ({}, True)
    with pytest.raises(ValueError, match=r"record h200.json = .*: must be of .*choose another --out"):
        Record("knee", tmp_path / "old", "h200", newer)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GPU", "gpu"),
    ],
)
def test_short_names(gpu, name):
    assert short_name(gpu) == name


class Pipes:
    """A device whose workers are ready at once."""

    name = mechanism = "pipes"

    def __init__(self):
        self.started, self.closed = [], []

    def start(self, model, share, cores=None, **options):
        reader, writer = os.pipe()
        os.write(writer, b"ready")
        self.started.append((model, share, options))
        return SimpleNamespace(
            fileno=lambda: reader, model=model, close=lambda: (self.closed.append(share), os.close(reader), os.close(writer))
        )


def test_workers_are_started_in_groups_and_none_is_left():
    device = Pipes()
    with Ahead(device, [("m", s) for s in (1.0, 2.0, 3.0)], most=2, batches=(4,)) as ahead:
        first = ahead.start("m", 1.0, seed=1)
        assert [s for _, s, _ in device.started] == [1, 2]
        assert device.started[0][2] == {"seed": 1, "batches": (4,)}
        ahead.start("m", 2.0).close()
        assert len(device.started) == 2
        ahead.start("m", 1.0).close()  # again, because the first one broke
        assert [s for _, s, _ in device.started] == [1, 2, 1]
        first.close()
        ahead.start("m", 3.0).close()
        ahead.waiting["m", 9.0] = device.start("m", 9.0)
    assert sorted(device.closed) == [1, 1, 2, 3, 9]


def test_ticks_are_true():
    """What data/README.md ticks is recorded, and what is recorded is ticked."""
    assert ticks.contradictions(ROOT / "data" / "README.md", ROOT / "data" / "recorded") == []
    assert set(ITEMS) <= set(ticks.said(ROOT / "data" / "README.md"))


def test_a_tick_that_is_not_true_is_seen(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("- [x] 2. **knee** (2026-01-02, h200): x\n- [ ] 3. **kernels**: y\n")
    assert ticks.contradictions(readme, tmp_path) == ["knee is ticked for h200 on 2026-01-02, but recorded is nothing"]
    record(tmp_path).run([Step("a", lambda: 1)])
    (seen,) = ticks.contradictions(readme, tmp_path)
    assert "but recorded is {'h200':" in seen  # of another date
    readme.write_text(readme.read_text().replace("2026-01-02", ticks.recorded(tmp_path, "knee")["h200"][0]))
    assert ticks.contradictions(readme, tmp_path) == []
    assert "complete" in ticks.status(tmp_path, ("knee",))
    readme.write_text(readme.read_text().replace("[x]", "[ ]"))
    assert "not ticked" in ticks.contradictions(readme, tmp_path)[0]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="agenda = 'nothing': must be one of probe, knee, "):
        perform("nothing", tmp_path)
    with pytest.raises(ValueError, match="device = 'tpu': must be one of gpu, mps, green, cpu"):
        perform("knee", tmp_path, "tpu")
    with pytest.raises(ValueError, match="minutes = 0: must be"):
        record(tmp_path, minutes=0)


def test_an_unknown_question_and_a_missing_gpu_are_answered(capsys):
    assert silicon.main(["sms", "{}"]) == 1
    assert NO_GPU.search(json.loads(capsys.readouterr().out)["error"])


def command(out, *more, env=None):
    done = subprocess.run(
        [sys.executable, "-m", "dstack_lab", "measure", "--agenda", *more, "--quick", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_probe_and_knee_on_this_machine_s_cores(tmp_path):
    command(tmp_path, "probe", "--device", "cpu")
    kept = json.loads((tmp_path / "probe" / "cpu.json").read_text())
    assert (kept["complete"], kept["failed"]) == (True, [])
    first = kept["steps"]["first inference, cpu"]["value"]
    assert 0 < first["ready_s"] < first["first_s"] < first["second_s"]
    command(tmp_path, "knee", "--device", "cpu")
    profile = lab.load_profile(tmp_path / "knee" / "cpu-cpu.csv")
    shares = set(Target("cpu", quick=True).shares(lab.devices.Cpu()))
    assert set(profile.table["gpu_pct"]) == shares
    assert len(profile.table) == 2 * 2 * len(shares)
    assert profile.provenance.kind == "measured"
    again = command(tmp_path, "knee", "--device", "cpu")
    assert "..." not in again.replace(" ...)", "")  # nothing is left to do
    assert len(list(tmp_path.rglob("*.*"))) <= 8


@pytest.mark.slow
def test_probe_and_knee_on_a_pretended_gpu_under_mps(tmp_path):
    """Programs, NVML and workers are stand-ins; what needs the silicon itself fails, is recorded, and costs nothing else."""
    env = {"PATH": f"{FAKES}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(FAKES)}
    command(tmp_path, "probe", "--device", "mps", env=env)
    kept = json.loads((tmp_path / "probe" / "h200.json").read_text())
    steps = kept["steps"]
    assert kept["provenance"]["versions"]["driver"] == "580.159"
    for done in ("findings", "mps start", "mps terminate_client", "mps quit", "first inference, mps"):
        assert steps[done]["state"] == "done", steps[done]
    assert steps["first inference, mps"]["value"]["facts"]["granted_sms"] == 132
    assert NO_GPU.search(steps["mps cap 33.3 %"]["error"])
    command(tmp_path, "knee", "--device", "mps", env=env)
    profile = lab.load_profile(tmp_path / "knee" / "h200-mps.csv")
    assert profile.models == ("resnet50", "vgg19")
    assert profile.provenance.mechanism == "MPS"
    assert set(profile.table["batch"]) == {1, 4}
    assert lab.load_profile(tmp_path / "knee" / "h200-mps-eager.csv").table["batch"].eq(1).all()


@pytest.fixture(scope="module")
def pretended(stub):  # noqa: F811
    """Environment of a machine with a GPU: programs, driver and NVML are stand-ins, workers sleep as long as a batch takes."""
    path = f"{FAKES}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(FAKES), "LD_LIBRARY_PATH": str(stub), "FAKE_GREEN": "1"}


def recorded(tmp_path, item):
    """The record and its tables; an item leaves 8 files at most, or some would not travel."""
    kept = json.loads((tmp_path / item / "h200.json").read_text())
    assert (kept["complete"], kept["failed"]) == (True, []), kept["steps"]
    assert kept["provenance"]["mechanism"] == "MPS and green contexts"
    assert len(list((tmp_path / item).iterdir())) <= 8
    return kept, {path.stem[5:]: pd.read_csv(path, comment="#") for path in (tmp_path / item).glob("*.csv")}


@pytest.mark.slow
def test_races_on_a_pretended_gpu(tmp_path, pretended):
    said = command(tmp_path, "multiplex", "--device", "gpu", env=pretended)
    kept, tables = recorded(tmp_path, "multiplex")
    runs = tables["runs"]
    assert set(zip(runs["mechanism"], runs["policy"], strict=True)) == {
        (mechanism, policy) for mechanism in ("mps", "green") for policy in ("DStack", "Temporal")
    }
    assert runs[["goodput_rps", "goodput_rps_simulated", "p99_ms", "dispatch_ms"]].notna().all(axis=None)
    whole = runs[runs["service"] == "all"]
    assert whole["sm_utilization"].to_numpy() == pytest.approx(0.6)  # as the stand-in for NVML says
    assert (whole["energy_j"] > 0).all()
    assert kept["steps"]["mps C-2 0.4 DStack"]["value"]["faults"] == {}
    for mechanism in ("mps", "green"):
        assert said.count(f"| C-2 on {mechanism} | 0.4 |") == 2
        assert (tables[f"{mechanism}-profile"]["effective_sms"] > 0).all()
    assert "not on green, whose shares are a true partition: Triton, Uncontrolled" in said


@pytest.mark.slow
def test_pairs_on_a_pretended_gpu(tmp_path, pretended):
    said = command(tmp_path, "pairs", "--device", "gpu", env=pretended)
    _, tables = recorded(tmp_path, "pairs")
    table = tables["pairs"]
    assert set(zip(table["mechanism"], table["sharing"], strict=True)) == {
        *(("mps", sharing) for sharing in ("alone", "shares", "no caps")),
        *(("green", sharing) for sharing in ("alone", "shares")),
    }
    sides = interference.slowdowns(table)
    assert len(sides) == (2 + 1) * 2 * 2  # two splits and the one without caps, two batches, two sides
    assert sides["slowdown"].median() == pytest.approx(1, abs=0.3)  # sleepers do not feel each other; the machine may be busy
    for mechanism in ("mps", "green"):
        assert f"{mechanism}: Contention(slowdown=" in said


@pytest.mark.slow
def test_shares_are_changed_on_a_pretended_gpu(tmp_path, pretended):
    command(tmp_path, "resize", "--device", "gpu", env=pretended)
    kept, tables = recorded(tmp_path, "resize")
    switches = tables["switches"]
    assert set(zip(switches["mechanism"], switches["way"], strict=True)) == {
        ("mps", "ready"),
        ("mps", "standby"),
        ("green", "ready"),
    }
    standby = kept["steps"]["mps standby resnet50"]["value"]
    assert (standby["switches"], standby["of"]) == (1, 1)
    assert standby["events"]["standby"] == standby["events"]["standby ready"] == 1
    assert standby["delay_ms"] > 0  # a process starts first, and the old share serves until then
    assert (switches.loc[switches["way"] == "ready", "to_pct"] != switches.loc[switches["way"] == "ready", "from_pct"]).all()


@pytest.mark.slow
def test_kernels_and_probe_on_a_pretended_gpu_name_what_needs_silicon(tmp_path, pretended):
    command(tmp_path, "probe", "--device", "gpu", env=pretended)
    kept = json.loads((tmp_path / "probe" / "h200.json").read_text())
    state = {name: step["state"] for name, step in kept["steps"].items()}
    assert [name for name in kept["failed"] if not NO_GPU.search(kept["steps"][name]["error"])] == []
    for done in ("findings", "green layout", "green cost", "mps start", "mps quit", "gpm idle", "first inference, green"):
        assert state[done] == "done", kept["steps"][done]
    assert kept["steps"]["green layout"]["value"]["coarse"] == [8] * 15 + [12]
    assert kept["steps"]["gpm idle"]["value"]["sm"] == 60
    both = kept["steps"]["shared parameters"]["value"]
    assert [(len(both[way]), {row["memory_mib"] for row in both[way]}) for way in ("shared", "own")] == [(2, {0.0}), (2, {0.0})]
    assert kept["steps"]["gpm idle"]["value"]["watts"] == pytest.approx(350, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "left"), [("mps", "green"), ("green", "mps")])
def test_a_mechanism_that_cannot_be_had_costs_the_other_nothing(tmp_path, pretended, missing, left):
    broken = {"FAKE_MPS": "status244"} if missing == "mps" else {"STUB_FAIL": "cuDevSmResourceSplitByCount=801"}
    said = command(tmp_path, "knee", "--device", "gpu", env=pretended | broken)
    kept = json.loads((tmp_path / "knee" / "h200.json").read_text())
    assert (kept["complete"], kept["failed"]) == (True, [missing])
    assert f"without {missing}: " in said
    assert set(lab.load_profile(tmp_path / "knee" / f"h200-{left}.csv").table["batch"]) == {1, 4}


def test_the_races_are_in_order_of_what_they_tell():
    whole = multiplex.grid(Target("gpu"))
    assert len(whole) == len(set(whole)) == 3 * 4 * len(multiplex.POLICIES)
    assert whole[0] == (0.8, "C-4", "DStack")
    assert {name for _, name, _ in whole} == set(WORKLOADS)
    policies = {name for name, kind in vars(lab.policies).items() if isinstance(kind, type) and issubclass(kind, lab.Policy)}
    assert policies - set(multiplex.POLICIES) == {"Policy", "Ideal"}  # which no device can run


def test_a_workload_for_cores_offers_the_load_it_is_asked_for():
    toy = builders.profile(squeezenet1_1=(4, 2, 40), shufflenet_v2_x1_0=(8, 1, 100))
    for load in (0.3, 0.9):
        services = multiplex.services_of("cpu-2", toy, load)
        assert load_of(services, toy) == pytest.approx(load)
        assert [s.slo_ms for s in services] == [4 * 36, 8 * 24]


def test_without_a_knee_no_race_is_begun(tmp_path):
    with pytest.raises(RuntimeError, match=r"mps and green of h200: no profile is recorded: first .* --agenda knee"):
        multiplex.run(Target("gpu"), record(tmp_path))


def test_races_compare_by_service_and_know_their_dispatch():
    toy = builders.profile(small=(1.0, 0.5, 40.0), large=(2.0, 1.0, 80.0))
    plan = lab.optimize([lab.Service("small", 25, lab.Poisson(200)), lab.Service("large", 50, lab.Poisson(100))], toy)
    trace = replace(lab.simulate(plan, lab.DStack(), 1000), recipe=recipe_of(plan, lab.DStack()))
    bare = multiplex.compared(trace).set_index("service")
    assert bare[["sm_utilization", "energy_j", "dispatch_ms"]].isna().all(axis=None)  # nothing said is not zero
    assert (bare.filter(like="_error") == 0).all(axis=None)
    late = trace.launches["service"].astype(str).map({"small": 0.25, "large": 0.5})
    trace.launches["worker_ms"] = trace.launches["end_ms"] - trace.launches["start_ms"] - late
    assert multiplex.compared(trace).set_index("service").loc[["small", "large"], "dispatch_ms"].tolist() == [0.25, 0.5]


@pytest.mark.slow
def test_races_on_this_machine_s_cores(tmp_path):
    said = command(tmp_path, "multiplex", "--device", "cpu")
    assert said.count("| cpu-2 on cpu | 0.4 |") == 2
    kept = json.loads((tmp_path / "multiplex" / "cpu.json").read_text())
    assert (kept["complete"], kept["failed"]) == (True, [])
    runs = pd.read_csv(tmp_path / "multiplex" / "cpu-runs.csv")
    for policy in ("DStack", "Temporal"):
        assert runs.loc[runs["policy"] == policy, "service"].tolist() == ["squeezenet1_1", "shufflenet_v2_x1_0", "all"]
    assert (runs["goodput_rps_simulated"] > 0).all()
    with zipfile.ZipFile(tmp_path / "multiplex" / "cpu-traces.zip") as traces:
        trace = lab.load_trace(traces.extract("cpu-cpu-2-0.4-DStack.npz", tmp_path))
    assert trace.provenance.kind == "measured"
    again = multiplex.compared(trace).set_index("service")["goodput_rps"]
    assert again.to_dict() == pytest.approx(runs[runs["policy"] == "DStack"].set_index("service")["goodput_rps"].to_dict())


def test_a_knee_is_kept_under_the_device_s_name_once_it_is_whole(tmp_path):
    kept = record(tmp_path)
    builders.profile(a=(1, 1, 40)).save(kept.table_path("mps"))
    kept.run([Step("mps a 50 %", boom), Step("mps a 100 %", lambda: 1)])
    with pytest.raises(RuntimeError, match=r"not kept: 1 steps of the knee are left or failed \(mps a 50 %\)"):
        keep_profile(kept, "mps", tmp_path)
    kept.run([Step("mps a 50 %", lambda: 1)])
    path = keep_profile(kept, "mps", tmp_path / "profiles")
    assert path.name == "h200.csv"
    assert lab.load_profile(path).models == ("a",)
    with pytest.raises(ValueError, match="keep = True: must be False, except for the knee without quick"):
        perform("probe", tmp_path, "cpu", keep=True)


def test_the_table_for_a_page_holds_both_numbers_and_the_error():
    row = {"workload": "C-2", "mechanism": "mps", "load": 0.8, "policy": "DStack", "service": "all"}
    row |= {"goodput_rps": 100.0, "goodput_rps_simulated": 98.0, "goodput_rps_error": -0.02, "slo_attainment": 0.99}
    row |= {"slo_attainment_simulated": 1.0, "p99_ms": 50.0, "p99_ms_simulated": 55.0, "p99_ms_error": 0.1}
    lines = markdown(pd.DataFrame([row, {**row, "service": "a"}])).splitlines()
    assert lines[2:] == ["| C-2 on mps | 0.8 | DStack | 100.0 | 98.0 | -2.0 % | 0.990 | 1.000 | 50 | 55 | +10.0 % |"]
    assert {line.count("|") for line in lines} == {12}

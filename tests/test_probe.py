"""The probe on machines that lack one thing each: told with the cure, and nothing is touched."""

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dstack_lab import devices
from dstack_lab.__main__ import main
from dstack_lab.devices import host, mps_daemon, nvml

FAKES = Path(__file__).parent / "fakes"
probe_file = importlib.import_module("dstack_lab.devices.probe")


@pytest.fixture
def look(monkeypatch, tmp_path):
    """Probe a machine with an H200, both MPS programs and a torch for CUDA; arguments change it."""
    import sys

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setattr(mps_daemon, "PLACES", ())
    monkeypatch.setattr(host, "usable_cores", lambda: tuple(range(8)))
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    found = {"torch": SimpleNamespace(origin=str(torch / "__init__.py")), "cuda.bindings": True}
    monkeypatch.setattr(probe_file.importlib.util, "find_spec", lambda name: found[name])

    def run(*, files=(), path=str(FAKES), without=(), visible=None, torch_cuda="'13.0'", **fake):
        for name, value in fake.items():
            monkeypatch.setenv(name, value if isinstance(value, str) else json.dumps(value))
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (torch / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {torch_cuda}\n")
        found.update(dict.fromkeys(without))
        environ = {"PATH": path} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        return devices.probe(environ, tmp_path)

    yield run
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


def test_a_machine_that_can_do_everything(look):
    seen = look()
    assert seen.devices == ("cpu", "mps", "green")
    assert not [f for f in seen.findings if f.ok is False]
    assert seen["driver"].found == "580.159, CUDA 13.0"
    assert seen["GPU"].found == "NVIDIA H200, 132 SMs, 140 GiB"
    assert seen["green context size"].found.startswith("groups of 8 SMs or more, in multiples of 8")
    assert seen["MPS programs"].found == f"{FAKES}/nvidia-cuda-mps-control, version 13000: up to 48 workers on a GPU"
    assert (seen["compute mode"].found, seen["MIG"].found, seen["GPM"].ok) == ("default", "off", True)
    assert str(seen).startswith("yes  driver")


@pytest.mark.parametrize(
    ("machine", "what", "cure", "left"),
    [
        ({"FAKE_DRIVER": "absent"}, "driver", "install one", ("cpu",)),
        ({"FAKE_DRIVER": "forbidden"}, "driver", "add this user to the group", ("cpu",)),
        ({"FAKE_GPUS": []}, "GPU", "--gpus all", ("cpu",)),
        ({"visible": ""}, "GPU", "unset CUDA_VISIBLE_DEVICES", ("cpu",)),
        ({"FAKE_GPUS": [{"MigMode": [1, 1]}]}, "MIG", "nvidia-smi -i 0 -mig 0", ("cpu",)),
        ({"FAKE_GPUS": [{"ComputeMode": 2}]}, "compute mode", "-c DEFAULT", ("cpu",)),
        ({"FAKE_CUDA": "12020"}, "driver for green contexts", "550", ("cpu", "mps")),
        ({"path": ""}, "MPS programs", "nvidia-compute-utils", ("cpu", "green")),
        ({"without": ["cuda.bindings"]}, "cuda-bindings", "pip install", ("cpu", "mps")),
        ({"without": ["torch"]}, "torch", "pip install", ("cpu",)),
        ({"torch_cuda": "None"}, "torch with CUDA", "install a CUDA build", ("cpu",)),
    ],
)
def test_what_is_missing_is_told_with_the_cure(look, machine, what, cure, left):
    seen = look(**machine)
    assert seen[what].ok is False
    assert cure in seen[what].cure
    assert seen.devices == left
    assert cure in " ".join(str(seen).split())


def test_what_is_only_worth_knowing(look):
    seen = look(
        FAKE_GPUS=[
            {"ComputeMode": 3, "gpm": 0, "pids": [42], "MigMode": None},
            {"UUID": "GPU-b", "CudaComputeCapability": [8, 0]},
        ],
        files={"tmp/nvidia-mps/control": "", "sys/fs/cgroup/cpu.max": "100000 100000"},
    )
    assert seen["compute mode 0"].found == "exclusive process: a process has it"
    assert (seen["GPM 0"].ok, seen["MIG 0"].found) == (None, "not supported")
    assert seen["processes 0"].found == "1 compute on it now: 42"
    assert "4 SMs or more, in multiples of 2" in seen["green context size 1"].found
    assert seen["foreign MPS daemon"].found.startswith("one listens in /tmp/nvidia-mps")
    assert seen["core quota"].ok is False
    assert seen.devices == ("cpu",)
    alone = look(FAKE_GPUS=[{"ComputeMode": 3}])
    assert alone["compute mode"].found == "exclusive process: only MPS, or one process"
    assert alone.devices == ("cpu", "mps", "green")
    with pytest.raises(KeyError):
        seen["moon"]


def test_a_step_that_breaks_hides_no_other(look, monkeypatch):
    monkeypatch.setattr(nvml, "gpus", lambda environ: 1 / 0)
    seen = look()
    assert seen["GPU"].found == "could not be looked at: ZeroDivisionError: division by zero"
    assert seen["MPS programs"].ok
    assert seen.devices == ("cpu",)


def test_looking_starts_and_changes_nothing(look, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_MPS_LOG", str(tmp_path / "asked"))
    before = dict(os.environ), sorted(tmp_path.rglob("*"))
    look()
    assert (dict(os.environ), sorted(tmp_path.rglob("*"))) == before  # the control program was asked its version only


def test_as_a_table(look):
    table = look().to_frame()
    assert list(table.columns) == ["what", "ok", "found", "cure"]
    assert table.set_index("what").loc["device mps", "ok"] is True
    assert table["what"].is_unique


def test_on_this_machine(capsys):
    assert main(["probe"]) == 0
    assert "device cpu" in capsys.readouterr().out
    assert callable(devices.probe)  # the file of that name does not hide it

"""A real Triton server on this machine's cores. Nothing here asserts a speed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from test_runner import plan

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.peers import server as servers
from dstack_lab.peers.client import Client
from dstack_lab.peers.repository import names
from dstack_lab.peers.server import Server, ServerError, find_program
from dstack_lab.runner import RunError

ROOT = Path(__file__).parents[1]
PYTHON = "{}.{}".format(*sys.version_info)


def place() -> str | None:
    """Where `make triton` puts the server, or where this machine has one."""
    for found in (str(ROOT / "build" / "triton"), None):
        try:
            find_program(found)
        except ValueError:
            continue
        return found
    pytest.skip("there is no Triton server here: `make triton` brings one")


@pytest.fixture
def server() -> str | None:
    pytest.importorskip("tritonclient.grpc", reason="the extra `triton` is not installed")
    return place()


def processes(word: str = "triton") -> set[int]:
    """Servers and their models, of anybody."""
    found = subprocess.run(["ps", "-eo", "pid,comm"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    return {int(line.split()[0]) for line in found if word in line.split(maxsplit=1)[1]}


def left_behind() -> list[str]:
    return [p.name for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())) for p in folder.glob("dstack_lab_*")]


def wait_until(true, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


# The server itself


@pytest.mark.slow
def test_the_server_gives_our_workers_answers(server):
    """Same networks, weights and inputs: only who forms the batches differs."""
    made, before, files = plan(12, 16), processes(), left_behind()
    trace = lab.peers.triton(made, lab.Triton(max_batch=2), Cpu(), 2000, seed=3, server=server, drain_ms=60_000)
    ours = lab.run(made, lab.Temporal(), Cpu(), 2000, seed=3, drain_ms=60_000)
    assert (trace.requests["outcome"] == "served").all()
    assert (trace.requests["answer"] == ours.requests["answer"]).all()
    assert trace.requests["score"].to_numpy() == pytest.approx(ours.requests["score"].to_numpy(), abs=1e-4)
    assert (trace.requests["arrival_ms"] == ours.requests["arrival_ms"]).all()
    assert set(trace.launches["batch"]) <= {1, 2}
    assert trace.requests.groupby("launch").size().to_dict() == trace.launches.set_index("launch")["batch"].to_dict()
    assert (trace.launches["gpu_pct"] > 0).all()
    assert trace.provenance.kind == "measured"
    assert trace.provenance.versions["tritonserver"] in trace.provenance.mechanism
    assert lab.validate(trace)["service"].to_list() == ["squeezenet1_1", "shufflenet_v2_x1_0", "all"]
    assert processes() <= before
    assert left_behind() == files


@pytest.mark.slow
def test_a_server_waits_as_long_as_the_policy_says(server):
    """Two requests 100 ms apart meet in one batch if the server may wait for 2 s, and only then."""
    times = lab.Replay([100.0, 200.0])
    made = plan(1)
    made = lab.Plan(
        (lab.Service("squeezenet1_1", 5000, times),), made.allocations, made.tables, made.shares, "test", made.provenance
    )
    runs = {d: lab.peers.triton(made, lab.Triton(2, d), Cpu(), 1000, server=server, drain_ms=60_000) for d in (0.0, 2000.0)}
    assert [runs[d].launches["batch"].to_list() for d in runs] == [[1, 1], [2]]


@pytest.mark.slow
def test_a_killed_server(server, monkeypatch):
    made, before, files = plan(10, 10), processes(), left_behind()

    def kill():
        for pid in processes("tritonserver") - before:
            os.kill(pid, signal.SIGKILL)

    def drive(*arguments):
        threading.Timer(1, kill).start()
        return real(*arguments)

    real = Client.drive
    monkeypatch.setattr(Client, "drive", drive)
    with pytest.raises(RunError, match="was killed by SIGKILL; its last words: none") as caught:
        lab.peers.triton(made, lab.Triton(), Cpu(), 60_000, seed=3, server=server)
    assert {"unserved"} < set(caught.value.trace.requests["outcome"])
    assert wait_until(lambda: processes() <= before)
    assert left_behind() == files


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 20], ids=["loading", "serving"])  # on a slow machine both may be loading
def test_a_killed_client_leaves_no_server(server, tmp_path, seconds):
    before = processes()
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import dstack_lab as lab
        from test_runner import plan
        lab.peers.triton(plan(5), device=lab.devices.Cpu(), duration_ms=60_000, server={server!r})
    """
    client = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert wait_until(lambda: processes("triton_python") - before, 120)
    time.sleep(seconds)
    client.kill()
    client.wait()
    assert wait_until(lambda: processes() <= before, 120)
    folders = [p.name for p in tmp_path.glob("dstack_lab_triton_*")]  # files of a killed client are left to the system
    assert len(folders) == 1
    assert not [*Path("/dev/shm").glob(f"{folders[0]}*")]


@pytest.mark.slow
def test_a_network_that_does_not_load(server):
    made = plan(5)
    made = lab.Plan(
        (lab.Service("no_such_net", 1000, lab.Poisson(5), "squeezenet1_1"),),
        made.allocations,
        made.tables,
        made.shares,
        "test",
        made.provenance,
    )
    with pytest.raises(ServerError, match=r"ended with status 1; its last words: .*no_such_net.*must be one of"):
        lab.peers.triton(made, device=Cpu(), server=server)


# Finding one: folders that look like those of the wheel


def wheel(root: Path, stubs=(PYTHON,), python: bool = True) -> Path:
    tree = root / "pytriton" / "tritonserver"
    for folder in ("bin", *(f"python_backend_stubs/{v}" for v in stubs), *(["backends/python"] if python else [])):
        (tree / folder).mkdir(parents=True)
    for file in (tree / "bin" / "tritonserver", *(p / "triton_python_backend_stub" for p in tree.glob("python_backend_stubs/*"))):
        file.write_text("#!/bin/sh\necho 'error: no models today' >&2\nexit 3\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (root / "nvidia_pytriton.libs").mkdir()
    return root


def test_a_folder_of_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "there")
    root = wheel(tmp_path)
    program = find_program(root)
    assert program.binary == root / "pytriton/tritonserver/bin/tritonserver"
    assert program.stub == root / f"pytriton/tritonserver/python_backend_stubs/{PYTHON}/triton_python_backend_stub"
    assert program.libraries == (root / "nvidia_pytriton.libs",)
    assert find_program(program.binary) == program
    monkeypatch.setenv("PATH", str(program.binary.parent))
    assert find_program() == program


@pytest.mark.parametrize("inside", ["", "bin", "nothing/here"])
def test_no_server(tmp_path, inside):
    with pytest.raises(ValueError, match="must be a Triton Inference Server; install it: python -m pip install --no-deps"):
        find_program(tmp_path / inside)


def test_no_server_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"^server = None: must be a Triton"):
        find_program()


def test_no_backend_for_this_python(tmp_path):
    with pytest.raises(ValueError, match=rf"a backend for Python {PYTHON}, it has 3\.8, 3\.10; use one of these"):
        find_program(wheel(tmp_path, ("3.10", "3.8")))


def test_no_python_backend(tmp_path):
    with pytest.raises(ValueError, match="must have a Python backend in"):
        find_program(wheel(tmp_path, (), python=False))


def test_no_libpython(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs libpython{PYTHON}\.so\.1\.0; install it: apt-get install libpython{PYTHON}"):
        find_program(wheel(tmp_path))


def test_a_server_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "there")
    with Server(find_program(wheel(tmp_path)), tmp_path, Cpu().slots()) as server:
        server._process.wait(30)
        with pytest.raises(ServerError, match="ended with status 3; its last words: error: no models today"):
            server.check()
    assert not Path(server._folder.name).exists()


def test_the_cure_names_the_pinned_version():
    pins = (ROOT / "constraints.txt").read_text().split()
    (named,) = [word.rstrip(",") for word in servers.CURE.split() if word.startswith("nvidia-pytriton")]
    assert named in pins


def test_names_are_those_of_folders():
    made = plan(1, 1)
    assert names(made) == ["0-squeezenet1_1", "1-shufflenet_v2_x1_0"]

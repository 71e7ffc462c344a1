"""A private daemon of NVIDIA's Multi-Process Service, in a short folder of its own under ``/tmp``."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

from dstack_lab.devices import mps_keeper, nvml
from dstack_lab.devices.parameter_host import ParameterHost
from dstack_lab.devices.parameter_map import PARAMETERS_GONE

CONTROL, SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"

#: Where the programs may lie beside PATH.
PLACES = ("/usr/local/nvidia/bin", "/usr/bin", "/usr/local/cuda/bin", "/opt/nvidia/bin")

#: Where a daemon that nobody gave a folder listens: every CUDA program finds it without asking.
FOREIGN = Path("/tmp/nvidia-mps")

#: What a worker's environment replaces; any other setting of MPS would reach it unseen.
REPLACED = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")

#: From this version of the programs on a GPU takes 60 clients, before it 48.
SIXTY_CLIENTS = 13010

#: Open files that NVIDIA's guide asks for where the server cannot make its shared memory.
FILES = 16_384

#: Exit status of ``-d`` where libcuda is missing; it prints nothing.
NO_LIBCUDA = 244


class MpsError(RuntimeError):
    """NVIDIA MPS cannot be used: the sentence says why, and the cure."""


def find_program(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Path of an MPS program: on PATH, then in `PLACES`."""
    path = os.pathsep.join(filter(None, [environ.get("PATH"), *PLACES]))  # an empty entry would be the current folder
    return shutil.which(name, path=path) if path else None


def version(control: str) -> int | None:
    """Version of the control program, such as 13000; starts nothing."""
    try:
        done = subprocess.run([control, "-v"], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"version:?\s*(\d+)", done.stdout + done.stderr, re.IGNORECASE)
    return int(found[1]) if found else None


def most_clients(version: int | None) -> int:
    """Processes that one GPU takes under programs of a version; the lesser number if it is unknown."""
    return 60 if (version or 0) >= SIXTY_CLIENTS else 48


def refuse_unusable(gpu: nvml.GpuFacts) -> None:
    """Say why MPS cannot share this GPU, if so.

    Raises
    ------
    MpsError
        With the cure.
    """
    if gpu.mig:
        raise MpsError(f"MIG is on for GPU {gpu.index}: its SMs are cut up already. As root: nvidia-smi -i {gpu.index} -mig 0")
    cure = f"As root: nvidia-smi -i {gpu.index} -c DEFAULT"
    if gpu.compute_mode in ("prohibited", "exclusive thread"):
        raise MpsError(f"compute mode of GPU {gpu.index} is {gpu.compute_mode}: MPS cannot serve it. {cure}")
    if gpu.compute_mode == "exclusive process" and gpu.processes:
        text = f"compute mode of GPU {gpu.index} is exclusive process and process {gpu.processes[0]} has it"
        raise MpsError(f"{text}: end that one (another MPS server?), or as root: nvidia-smi -i {gpu.index} -c DEFAULT")


def foreign_daemon(folder: Path = FOREIGN) -> bool:
    """Whether somebody's daemon listens where every CUDA program looks first."""
    if not (folder / "control").exists():
        return False
    pid = mps_keeper.number_in(f"{folder}/{CONTROL}.pid")
    return not pid or mps_keeper.lives(pid[0])  # not ours to read: assume the worst


class MpsDaemon:
    """Start a control daemon and its server; both end with `quit`, with this object, or with this process.

    The compute mode is left as it is, a daemon of somebody else too.

    Parameters
    ----------
    uuid : str, optional
        The one GPU to serve; all that are visible otherwise.
    timeout_s : float
        Longest wait for the server to become active.

    Raises
    ------
    MpsError
        If the programs are missing or do not do what they should.
    """

    def __init__(self, uuid: str | None = None, timeout_s: float = 60.0) -> None:
        if limits := sorted(key for key in os.environ if key.startswith("CUDA_MPS_") and key not in REPLACED):
            raise MpsError(f"{limits[0]} is set in the environment and would change every worker: unset it")
        control = find_program(CONTROL)
        if control is None:
            cure = "install the package nvidia-compute-utils of your driver's version, or start the container with the "
            raise MpsError(f"{CONTROL} is neither on PATH nor in {', '.join(PLACES)}: {cure}'compute' driver capability")
        path = os.pathsep.join(filter(None, [str(Path(control).parent), os.environ.get("PATH")]))
        if find_program(SERVER, {"PATH": path}) is None:
            raise MpsError(f"{SERVER} is missing beside {control}: install both programs from the same driver package")
        self.control, self.version, self.server = control, version(control), 0
        # Sockets' paths end at 108 characters, and TMPDIR may be long.
        self.root = tempfile.mkdtemp(prefix="mps", dir="/tmp")
        self.folders = mps_keeper.folders(self.root)
        env = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_MPS_")}
        self.visible = {} if uuid is None else {"CUDA_VISIBLE_DEVICES": uuid}
        self.env = env | self.folders | self.visible | {"PATH": path}
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", mps_keeper.__file__, control, self.root],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.env,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process only
        )
        self._hosts: list[ParameterHost] = []
        #: Why workers hold parameters of their own, though they were to share them.
        self.unshared: list[str] = []
        self._finalizer = weakref.finalize(self, _dismiss, keeper, self._hosts, os.getpid())  # also at interpreter exit
        try:
            self._start(timeout_s)
        except BaseException:
            self.quit()
            raise

    def _start(self, timeout_s: float) -> None:
        for folder in self.folders.values():
            Path(folder).mkdir(mode=0o700)
        quiet = subprocess.DEVNULL  # no pipes: the daemon would keep them open
        try:
            done = subprocess.run(
                [self.control, "-d"], env=self.env, timeout=60, stdin=quiet, stdout=quiet, stderr=quiet, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MpsError(f"{self.control} -d did not start ({error}): {self._log()}") from error
        if done.returncode == NO_LIBCUDA:
            raise MpsError(f"{CONTROL} cannot load libcuda.so.1 (exit status 244): install the NVIDIA driver's libraries")
        if done.returncode:
            raise MpsError(f"{CONTROL} -d ended with status {done.returncode}: {self._log()}")
        _allow_files(self.pid)
        self.command(f"start_server -uid {os.getuid()}")  # paid now, not by the first worker
        end, status = time.monotonic() + timeout_s, "not started"
        while True:
            servers = self.command("get_server_list").split()
            if servers and servers[0].isdigit():
                self.server, status = int(servers[0]), self.command(f"get_server_status {servers[0]}")
                Path(self.root, "server").write_text(servers[0], encoding="ascii")  # for the keeper
            if status == "ACTIVE":
                return
            if status == "FAULT":
                raise MpsError(f"the MPS server is in FAULT: end every program on this GPU, then try again. {self._log()}")
            if time.monotonic() > end:
                raise MpsError(f"the MPS server is not ACTIVE after {timeout_s:g} s ({status}): {self._log()}")
            time.sleep(0.05)

    def _log(self) -> str:
        """Last words of the daemon and its server."""
        texts = []
        for name in ("control.log", "server.log"):
            path = Path(self.folders["CUDA_MPS_LOG_DIRECTORY"], name)
            texts += [path.read_text(errors="replace").strip()[-500:]] if path.exists() else []
        return (
            f"its log says: {' | '.join(texts)}"
            if any(texts)
            else "its log is empty; run nvidia-smi to see whether the GPU answers"
        )

    def command(self, line: str, timeout_s: float = 30.0) -> str:
        """Give a command and return the answer.

        Raises
        ------
        MpsError
            If the daemon is gone, refuses, or does not answer in time.
        """
        try:
            done = subprocess.run(
                [self.control], input=line + "\n", env=self.env, text=True, timeout=timeout_s, capture_output=True, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MpsError(f"the MPS daemon does not answer {line!r} ({error}): end all workers and start again") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
            raise MpsError(f"the MPS daemon refused {line!r}: {said}")
        return done.stdout.strip()

    @property
    def pid(self) -> int | None:
        """Process of the daemon."""
        return mps_keeper.daemon_pid(self.root)

    @property
    def alive(self) -> bool:
        """Whether it still runs. A client of a dead daemon would compute outside MPS without a word."""
        pid = self.pid if self._finalizer.alive else None
        return pid is not None and mps_keeper.lives(pid)

    @property
    def most_clients(self) -> int:
        """Processes that one GPU takes."""
        return most_clients(self.version)

    def client_env(self, gpu_pct: float) -> dict[str, str]:
        """Environment of a client capped at a share: settled before its CUDA starts, fixed afterwards."""
        return self.folders | self.visible | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{gpu_pct:g}"}

    def parameters(self, gpu_pct: float) -> ParameterHost:
        """Return the process that holds the parameters of all workers; started at the first call, as a client."""
        if not self._hosts:
            end_client = weakref.WeakMethod(self.terminate_client)  # the host must not keep its daemon alive
            let_go = lambda pid: (end := end_client()) is not None and end(pid)  # noqa: E731
            self._hosts.append(ParameterHost(self.root, self.client_env(gpu_pct), let_go=let_go))
        return self._hosts[0]

    @property
    def pids(self) -> set[int]:
        """Processes on the GPU that are no workers: the server, and who holds the parameters."""
        return {self.server, *(host.pid for host in self._hosts)}

    @property
    def parameters_lost(self) -> str | None:
        """Say so if that process ended, so that what the workers mapped is not to be trusted; with its last words."""
        if not self._hosts or self._hosts[0].alive:
            return None
        return ": ".join(filter(None, [PARAMETERS_GONE, self._hosts[0].last_words]))

    def serves(self, pid: int) -> bool:
        """Whether a process is a client of the server, as the daemon says."""
        try:
            return str(pid) in self.command(f"get_client_list {self.server}").split()
        except MpsError:
            return False

    def terminate_client(self, pid: int) -> bool:
        """End a client's work on the GPU, as must be done before its process is killed; return whether it worked."""
        try:
            return self.command(f"terminate_client {self.server} {pid}", timeout_s=10) in ("", "0")
        except MpsError:  # not connected yet, gone already, or the daemon is dead
            return False

    def quit(self) -> None:
        """End server and daemon, remove their folder, and wait for it. Twice is fine."""
        self._finalizer()


def _allow_files(pid: int | None) -> None:
    """Let the daemon, and the servers it starts, open as many files as many clients need: its soft limit may be 1024."""
    with contextlib.suppress(OSError, ValueError):  # not ours to change: as it is then
        if pid is not None:
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            room = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
            if soft != resource.RLIM_INFINITY and soft < room:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (room, hard))


def _dismiss(keeper: subprocess.Popen[bytes], hosts: list[ParameterHost], owner: int) -> None:
    if os.getpid() != owner:  # a forked child leaves its parent's daemon alone
        return
    for host in hosts:
        host.close()
    assert keeper.stdin is not None
    keeper.stdin.close()
    keeper.wait()

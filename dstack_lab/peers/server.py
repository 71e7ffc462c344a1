"""A Triton Inference Server of our own: found, started on given cores, watched, never left behind."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from dstack_lab.devices.spawn import on_cores, worker_env

CURE = "install it: python -m pip install --no-deps --target build/triton nvidia-pytriton==0.7.0, and pass server='build/triton'"
#: Where a folder may hold the program: one that pip filled, a virtual environment, the server's own.
INSIDE = (
    "pytriton/tritonserver/bin/tritonserver",
    "lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver",
    "bin/tritonserver",
)
GRACE_S = 10.0  #: to end in good order
#: What a server without a GPU always complains of.
ALWAYS = ("pinned_memory_manager", "CudaDriverHelper")
MEMORY = Path("/dev/shm")


class ServerError(RuntimeError):
    """The server could not be started, or ended; the sentence says why, as far as it told."""


class Program(NamedTuple):
    """Where a server lies: its program, its backends, and the libraries that came along."""

    binary: Path
    backends: Path
    stub: Path | None  #: Python backend for this Python, where it lies apart
    libraries: tuple[Path, ...]


def find_program(place: str | os.PathLike[str] | None = None) -> Program:
    """Find a Triton server on this machine.

    Parameters
    ----------
    place : path, optional
        The program ``tritonserver``, or a folder that nvidia-pytriton was installed into. By default
        what ``tritonserver`` finds on the path, else nvidia-pytriton beside this package.

    Raises
    ------
    ValueError
        If there is none, or it has no backend for this Python; the message names the cure.
    """
    binary = _binary(place)
    if binary is None:
        raise ValueError(f"server = {place and str(place)!r}: must be a Triton Inference Server; {CURE}")
    tree, python = binary.parent.parent, "{}.{}".format(*sys.version_info)
    stubs, stub = tree / "python_backend_stubs", None
    if stubs.is_dir():
        stub = stubs / python / "triton_python_backend_stub"
        if not stub.is_file():
            have = ", ".join(sorted((p.name for p in stubs.iterdir()), key=lambda v: [*map(int, v.split("."))]))
            raise ValueError(
                f"server = {str(binary)!r}: must have a backend for Python {python}, it has {have}; use one of these"
            )
        library = f"libpython{python}.so.1.0"
        folder = Path(sysconfig.get_config_var("LIBDIR") or "")
        if not (folder / library).exists() and ctypes.util.find_library(f"python{python}") is None:
            raise ValueError(f"server = {str(binary)!r}: needs {library}; install it: apt-get install libpython{python}")
    backends = tree / "backends"
    if not (backends / "python").is_dir():
        raise ValueError(f"server = {str(binary)!r}: must have a Python backend in {backends}; {CURE}")
    bundled = tree.parent.parent / "nvidia_pytriton.libs"
    return Program(binary, backends, stub, (bundled,) if bundled.is_dir() else ())


def _binary(place: str | os.PathLike[str] | None) -> Path | None:
    if place is None:
        found = shutil.which("tritonserver")
        spec = importlib.util.find_spec("pytriton")
        if found is None and spec is not None and spec.origin:
            found = str(Path(spec.origin).parent / "tritonserver/bin/tritonserver")
        place = found or ""
    path = Path(place).expanduser().resolve()
    inside = [path, *(hit for pattern in INSIDE for hit in sorted(path.glob(pattern)))] if place else []
    return next((p for p in inside if p.is_file() and os.access(p, os.X_OK)), None)


class Server:
    """A running server. It serves until `close`, or until this process ends.

    Parameters
    ----------
    program : Program
    repository : Path
        Models to serve.
    cores : sequence of int
        Cores it may run on, its models too.
    """

    def __init__(self, program: Program, repository: Path, cores: Sequence[int]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dstack_lab_triton_")
        folder = Path(self._folder.name)
        self._log, prefix = folder / "log", folder.name
        self.url = f"127.0.0.1:{_free_port()}"
        command = [str(program.binary), f"--model-repository={repository}", f"--backend-directory={_backends(program, folder)}"]
        command += ["--grpc-address=127.0.0.1", f"--grpc-port={self.url.rpartition(':')[2]}", "--allow-http=false"]
        command += ["--allow-metrics=false", "--log-info=false", "--exit-timeout-secs=5"]
        command += [f"--backend-config=python,shm-region-prefix-name={prefix}"]
        env = worker_env(len(cores), {"DSTACK_LAB_CLIENT": str(os.getpid()), "DSTACK_LAB_REGIONS": prefix})
        paths = [*program.libraries, sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, map(str, paths)))
        with on_cores(cores), open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        self._finalizer = weakref.finalize(self, _end, self._process, prefix)  # also at interpreter exit

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    def check(self) -> None:
        """Raise unless the server runs.

        Raises
        ------
        ServerError
            With its last words.
        """
        status = self._process.poll()
        if status is None:
            return
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise ServerError(f"the Triton server {how}; its last words: {self.last_words()}")

    def last_words(self) -> str:
        """What it logged last, errors before anything else, in one line."""
        lines = [line.strip()[:500] for line in self._log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line and not any(word in line for word in ALWAYS)]
        return " / ".join(([line for line in lines if line.startswith(("E", "error"))] or lines)[-2:]) or "none"

    def close(self) -> None:
        """End the server and what it started, and remove its files."""
        self._finalizer()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _backends(program: Program, folder: Path) -> Path:
    """Folder with the Python backend for this Python; the wheel keeps one for each Python apart."""
    if program.stub is None:
        return program.backends
    target = folder / "backends" / "python"
    target.mkdir(parents=True)
    for source in (*(program.backends / "python").glob("*triton_python*"), program.stub):
        (target / source.name).symlink_to(source)
    return target.parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes], prefix: str) -> None:
    """End a server in good order, or by force; remove the shared memory that a killed one leaves."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # its models are in its process group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for left in MEMORY.glob(f"{prefix}*"):
        left.unlink(missing_ok=True)

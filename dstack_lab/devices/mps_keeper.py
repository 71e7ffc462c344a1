"""Ends a private MPS daemon when its owner does, however that one ends: ``python mps_keeper.py CONTROL FOLDER``.

Its standard input is a pipe from the owner. A line, or the pipe's end when the owner is gone (even
by SIGKILL), is the sign to quit. Needs nothing but Python: it runs in isolated mode.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

#: Seconds that clients get to finish, and the daemon to answer.
CLIENTS_S = 10
ANSWER_S = 30


def quit_daemon(control: str, folder: str) -> None:
    """Ask the daemon to quit, end it by force if it does not, and remove its folder."""
    pid = daemon_pid(folder)
    # Servers do not always end with their daemon.
    family = {*([] if pid is None else [pid, *children(pid)]), *number_in(f"{folder}/server")}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [control],
            input=f"quit -t {CLIENTS_S}\n".encode(),
            env={**os.environ, **folders(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_S,
            check=False,
        )
    for member in family:
        for number in (0, signal.SIGTERM, signal.SIGKILL):
            if not wait_gone(member, number):
                break
    shutil.rmtree(folder, ignore_errors=True)


def folders(folder: str) -> dict[str, str]:
    """Environment that leads to the daemon of `folder`."""
    return {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/p", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/l"}


def daemon_pid(folder: str) -> int | None:
    """Process of the daemon, from the file it writes."""
    return next(iter(number_in(f"{folder}/p/nvidia-cuda-mps-control.pid")), None)


def number_in(path: str) -> list[int]:
    """The number that a file begins with, if any."""
    try:
        return [int(word) for word in pathlib.Path(path).read_text(encoding="ascii").split()[:1]]
    except (OSError, ValueError):
        return []


def children(pid: int) -> list[int]:
    """Processes that `pid` started."""
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []


def lives(pid: int) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pid: int, number: int, seconds: float = 2.0) -> bool:
    """Send signal `number` and wait; return whether the process is still there."""
    if not lives(pid):
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, number)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not lives(pid):
            return False
        time.sleep(0.01)
    return True


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.buffer.readline()
    quit_daemon(sys.argv[1], sys.argv[2])

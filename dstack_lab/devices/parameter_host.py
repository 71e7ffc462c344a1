"""The process that holds one copy of each network's parameters for all of its workers.

``python -m dstack_lab.devices.parameter_host FD DEVICE``: FD is a listening socket. Each connection brings one line of
JSON: which network, as what; it is answered with how to map it, or an ``error``, and stays open: its end tells a
worker that what it mapped is gone. A worker of any share may die, be replaced or retired: it owns nothing.
The process ends with its standard input, at the latest with whoever started it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dstack_lab import zoo
from dstack_lab.devices.parameter_map import Block, exported, pack
from dstack_lab.devices.spawn import end, keep_tail, worker_env
from dstack_lab.protocol import Lines, Message, encode

#: How long a worker may take to say what it wants, and the process to end in good order [s].
ASK_S, CLOSE_S = 10.0, 5.0


class ParameterHost:
    """That process, as the one who starts the workers sees it.

    Parameters
    ----------
    folder : path
        Where its socket lies; short, as sockets' paths have to be.
    env : mapping of str to str
        Environment beyond that of a worker: what makes it a client of NVIDIA MPS.
    device : str
        ``"cuda"`` or ``"cpu"``.
    let_go : callable, optional
        Told its number before it is killed.
    """

    def __init__(
        self, folder: str | Path, env: Mapping[str, str], device: str = "cuda", let_go: Callable[[int], object] = lambda pid: None
    ) -> None:
        self.path = f"{folder}/parameters"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(self.path)
            listening.listen(64)
            command = [sys.executable, "-m", __name__, str(listening.fileno()), device]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[listening.fileno()],
                bufsize=0,
                env=worker_env(1, dict(env)),
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent only
            )
        self._finalizer = weakref.finalize(self, _dismiss, self._process, let_go, os.getpid())
        self._tail = bytearray()
        assert self._process.stderr is not None
        threading.Thread(target=keep_tail, args=(self._process.stderr, self._tail), daemon=True).start()

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether what it holds can be mapped."""
        return self._finalizer.alive and self._process.poll() is None

    @property
    def last_words(self) -> str:
        """What it wrote on its standard error."""
        return self._tail.decode(errors="replace").strip()[-600:]

    def close(self) -> None:
        """End it, after all who mapped something. Twice is fine."""
        self._finalizer()


def _dismiss(process: subprocess.Popen[bytes], let_go: Callable[[int], object], owner: int) -> None:
    if os.getpid() != owner:
        return
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        let_go(process.pid)
    end(process)


class Holder:
    """The blocks, loaded when they are first asked for.

    Parameters
    ----------
    device : str
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.blocks: dict[tuple[Any, ...], Block] = {}
        self.lines: list[socket.socket] = []

    def greet(self, line: socket.socket) -> None:
        """Answer one worker, and keep the line to it open; one that asks nothing in time is hung up on."""
        try:
            line.settimeout(ASK_S)
            messages, lines = list[Message](), Lines()
            while not messages and (data := line.recv(65536)):
                messages = lines.feed(data)
            if not messages:
                raise ConnectionAbortedError
            try:
                answer = exported(self.block(**messages[0]))
            except Exception as error:  # whoever asks loads its own then, and says why
                answer = {"error": f"{type(error).__name__}: {error}"}
            line.sendall(encode(answer))
        except (OSError, ValueError):  # nobody to answer, or no JSON
            line.close()
        else:
            self.lines = [known for known in self.lines if not _hung_up(known)] + [line]

    def block(self, model: str, weights: str | None, seed: int, dtype: str, channels_last: bool) -> Block:
        """Return the parameters of a network, in a precision and memory format."""
        import torch

        key = model, weights, seed, dtype, channels_last
        if key not in self.blocks:
            form: dict[str, Any] = {"memory_format": torch.channels_last} if channels_last else {}
            module = zoo.load(model, weights=weights, device="cpu", seed=seed).module
            self.blocks[key] = pack(module.to(dtype=getattr(torch, dtype), **form), self.device)
        return self.blocks[key]


def _hung_up(line: socket.socket) -> bool:
    if not select.select([line], [], [], 0)[0]:
        return False
    line.close()
    return True


def main(arguments: list[str]) -> None:
    """Serve until the standard input ends; ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listening, holder = socket.socket(fileno=int(arguments[0])), Holder(arguments[1])
    listening.set_inheritable(False)  # whoever torch starts would keep it open after this process
    while 0 not in select.select([0, listening.fileno()], [], [])[0]:
        holder.greet(listening.accept()[0])
    sys.stderr.flush()
    os._exit(0)  # at once, whatever libraries would still do


if __name__ == "__main__":
    main(sys.argv[1:])

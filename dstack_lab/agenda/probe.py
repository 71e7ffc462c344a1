"""Item 1: what the machine can do, asked of the machine itself; changes none of its settings."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from dstack_lab.agenda.record import Record, Step
from dstack_lab.agenda.target import Target
from dstack_lab.devices import nvml
from dstack_lab.devices import probe as look
from dstack_lab.devices.base import WorkerError

#: Caps whose real SMs are read back [%].
CAPS = (5, 10, 25, 33.3, 50, 75, 100)
#: How long a child may take [s], and the first one, which reads torch from a cold disk.
CHILD_S, COLD_S = 90.0, 240.0


def run(target: Target, record: Record) -> None:
    """Do the steps that are left."""
    steps = [Step("findings", _findings, 0)]
    if target.on_gpu:
        steps.append(Step("torch starts", lambda: child("start", timeout_s=COLD_S), 30))
        if "green" in target.mechanisms:
            from dstack_lab.devices.green_smid import verify_disjoint

            steps += [
                Step("green layout", lambda: child("layout")),
                Step("green cost", lambda: child("green_cost")),
                Step("green disjoint", lambda: _proof(verify_disjoint(timeout_s=CHILD_S))),
                Step("green graph", lambda: child("graph")),
            ]
        if "mps" in target.mechanisms:
            steps += _mps_steps(target)
        steps += [Step("ipc without MPS", lambda: child("ipc")), Step("kineto", lambda: child("kineto"))]
        from dstack_lab.agenda import meters

        steps += meters.steps(target)
    steps += [Step(f"first inference, {m}", lambda m=m: first_inference(target, m), 60) for m in target.mechanisms]  # type: ignore[misc]
    record.run(steps)


def _findings() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in look().to_frame().to_dict("records")]
    return [*rows, {"what": "kernel", "found": " ".join(os.uname())}]


def _proof(proof: Any) -> dict[str, Any]:
    return {"seen": proof.seen, "granted": proof.granted, "disjoint": proof.disjoint, "exact": proof.exact, "text": str(proof)}


@contextlib.contextmanager
def alone() -> Iterator[dict[str, str]]:
    """Environment of a child that no MPS daemon serves."""
    from dstack_lab.devices.green_driver import without_mps

    with without_mps() as env:
        yield env


def begin(what: str, env: dict[str, str], **arguments: Any) -> subprocess.Popen[str]:
    """Start a child of `silicon`."""
    command = [sys.executable, "-m", "dstack_lab.agenda.silicon", what, json.dumps(arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env=env, **pipes)  # type: ignore[call-overload, no-any-return]


def answer(process: subprocess.Popen[str], timeout_s: float = CHILD_S) -> dict[str, Any]:
    """Wait for a child's answer.

    Raises
    ------
    RuntimeError
        If it has none: with its error, or its last words.
    """
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    try:
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"the child ended with status {process.returncode}: {err.strip()[-600:]}") from None
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def begun(process: subprocess.Popen[str], timeout_s: float = CHILD_S) -> None:
    """Wait for a child's first line.

    Raises
    ------
    RuntimeError
        If it says none, or an error; with its last words.
    """
    assert process.stdout is not None
    if select.select([process.stdout], [], [], timeout_s)[0]:
        line = process.stdout.readline()
        if line and "error" not in json.loads(line):
            return
        raise RuntimeError(json.loads(line)["error"] if line else f"the child ended: {process.communicate()[1].strip()[-600:]}")
    raise RuntimeError(f"the child did not begin within {timeout_s:g} s")


def child(what: str, env: dict[str, str] | None = None, timeout_s: float = CHILD_S, **arguments: Any) -> dict[str, Any]:
    """Run a child of `silicon`, without MPS unless `env` says otherwise, and return its answer."""
    if env is not None:
        return answer(begin(what, env, **arguments), timeout_s)
    with alone() as own:
        return answer(begin(what, own, **arguments), timeout_s)


def _mps_steps(target: Target) -> list[Step]:
    from dstack_lab.devices.mps import Mps
    from dstack_lab.devices.spawn import worker_env

    device = Mps()

    def capped(cap: float) -> dict[str, str]:
        return worker_env(1, device._daemon().client_env(cap))

    def start() -> dict[str, Any]:
        begin_s = time.monotonic()
        daemon = device._daemon()
        return {"seconds": time.monotonic() - begin_s, "control": daemon.control, "version": daemon.version}

    def read_back(cap: float) -> dict[str, Any]:
        found = child("sms", capped(cap))
        asked = cap * device.all_sms() / 100
        return {"cap_pct": cap, "asked_sms": asked, "seen_sms": len(found["seen"]), **found}

    def meet(one: float, other: float) -> dict[str, Any]:
        at = time.monotonic() + 20
        first, second = (begin("sms", capped(cap), seconds=2.0, at=at) for cap in (one, other))
        with first, second:
            found = [answer(first), answer(second)]
        shared = sorted(set(found[0]["seen"]) & set(found[1]["seen"]))
        overlap_s = min(f["end"] for f in found) - max(f["begin"] for f in found)
        return {"caps_pct": (one, other), "shared": shared, "meet": bool(shared), "overlap_s": overlap_s, "children": found}

    def terminate() -> dict[str, Any]:
        worker = device.start(target.models[0], 100.0)
        try:
            worker.wait_ready(CHILD_S)
            begin_s = time.monotonic()
            worked = worker.daemon.terminate_client(worker.pid)
            seconds = time.monotonic() - begin_s
            try:
                after = str(worker.ask({"op": "run", "inputs": [0]}, 20)["reply"])
            except (WorkerError, ValueError) as error:
                after = f"{type(error).__name__}: {error}"
            return {"worked": worked, "seconds": seconds, "next_request": after}
        finally:
            worker.kill()

    def leave() -> dict[str, Any]:
        begin_s = time.monotonic()
        device.stop()
        return {"seconds": time.monotonic() - begin_s}

    return [
        Step("mps start", start, 60),
        *(Step(f"mps cap {cap:g} %", lambda cap=cap: read_back(cap)) for cap in CAPS),  # type: ignore[misc]
        *(Step(f"mps {a:g} % beside {b:g} %", lambda a=a, b=b: meet(a, b), 60) for a, b in ((50, 50), (25, 75))),  # type: ignore[misc]
        Step("ipc under MPS", lambda: child("ipc", capped(50)), 60),
        Step("shared parameters", lambda: sharing(target), 60),
        Step("mps terminate_client", terminate, 60),
        Step("mps quit", leave),
    ]


def sharing(target: Target) -> dict[str, Any]:
    """What a second worker of a network costs, sharing parameters or with its own: load [ms], memory [MiB]."""
    found: dict[str, Any] = {}
    for name, shared in (("shared", True), ("own", False)):
        device = target.device("mps", share_parameters=shared)
        with contextlib.ExitStack() as stack:
            used_mib, rows = nvml.used_mib(0), []
            for _ in range(2):
                ready = stack.enter_context(device.start(target.models[1], 50.0)).wait_ready(CHILD_S)
                before_mib, used_mib = used_mib, nvml.used_mib(0)
                more = None if used_mib is None or before_mib is None else used_mib - before_mib
                facts = {key: ready["facts"].get(key) for key in ("parameters", "why_not_shared")}
                rows.append({"load_ms": ready["load_ms"], "memory_mib": more, **facts})
            found[name] = rows
    return found


def first_inference(target: Target, mechanism: str) -> dict[str, Any]:
    """How long it takes from starting a worker on the whole device to its first answer [s], and to the second."""
    device = target.device(mechanism)
    begin_s = time.monotonic()
    with device.start(target.models[0], 100.0) as worker:
        ready = worker.wait_ready(CHILD_S)
        ready_s = time.monotonic() - begin_s
        worker.ask({"op": "run", "inputs": [0]}, CHILD_S)
        first_s = time.monotonic() - begin_s
        worker.ask({"op": "run", "inputs": [1]}, CHILD_S)
        facts = {key: value for key, value in ready["facts"].items() if key != "team"}
        return {
            "model": worker.model,
            "ready_s": ready_s,
            "first_s": first_s,
            "second_s": time.monotonic() - begin_s,
            "facts": facts,
        }

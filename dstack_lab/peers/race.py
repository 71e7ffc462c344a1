"""A run of a plan's requests on a real Triton Inference Server: the same `Trace` as of our own workers."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dstack_lab.checks import count, positive, require
from dstack_lab.devices import Cpu
from dstack_lab.peers.answers import written
from dstack_lab.peers.client import Client, Sent
from dstack_lab.peers.repository import names, settings, write_repository
from dstack_lab.peers.server import Server, find_program
from dstack_lab.policies import Triton
from dstack_lab.progress import progress_bar
from dstack_lab.provenance import Provenance, today, versions_here
from dstack_lab.recipes import recipe_of
from dstack_lab.runner import RunError
from dstack_lab.services import Plan
from dstack_lab.simulator import sample_arrivals
from dstack_lab.state import NS_PER_MS
from dstack_lab.traces import Trace

#: A client this late [ms] for 1 % of its requests leaves a mark.
LATE_MS = 5.0
#: How long a server that is said to run may take to answer at all [s].
LIVE_S = 10.0

#: What a server is told about a service, see `repository.settings`.
Told = dict[str, Any]


def triton(
    plan: Plan,
    policy: Triton | None = None,
    device: Cpu | None = None,
    duration_ms: float = 10_000.0,
    seed: int = 0,
    *,
    server: str | Path | None = None,
    url: str | None = None,
    drain_ms: float | None = None,
    progress: bool = False,
    start_timeout_s: float = 300.0,
) -> Trace:
    """Send a plan's requests to a real Triton Inference Server.

    Requests leave at the times `simulate` and `run` use for the same seed, also when the server falls
    behind. Its networks are those of our workers, with the same weights and inputs, each one instance of
    Triton's Python backend on all cores. It batches as ``policies.Triton`` says, so that ``lab.validate``
    of the trace tells how far the simulated Triton is off.

    Parameters
    ----------
    plan : Plan
        Of services on this device; the shares and batches of its allocations are not used.
    policy : Triton, optional
        Its ``max_batch`` and ``delay_ms`` are the server's dynamic batching; ``Triton()`` by default.
    device : Cpu, optional
        Whose cores the server runs on; ``Cpu()`` by default.
    duration_ms : float
        Requests arrive in [0, duration_ms).
    seed : int
        Of arrivals, weights and inputs.
    server : path, optional
        The program ``tritonserver``, or a folder that nvidia-pytriton was installed into. By default what
        is on the path or beside this package.
    url : str, optional
        ``host:port`` (gRPC) of a server that runs already and serves the folder that `write_repository` wrote
        for this plan, policy and seed, instead of `device` and `server`.
    drain_ms : float, optional
        How long to wait for answers after the last request; as long as `duration_ms` by default.
    progress : bool
        Show a progress bar.
    start_timeout_s : float
        How long the server may take to load [s].

    Returns
    -------
    Trace
        As of `run`. A launch is a batch that the server formed: it ends when the first of its answers is
        back, and began as long before as its network says it took (``worker_ms``). Its ``gpu_pct`` is the
        processor time that it got, as a part of all threads' on all cores (100 if the networks are on a GPU):
        batches run beside each other without a partition. A request that the server failed counts as dropped; ``events`` say why.

    Raises
    ------
    ValueError
        If an argument is out of range, there is no server or client here, or the one at `url` serves
        something else; the message names the cure.
    RuntimeError
        If the server does not start or become ready.
    RunError
        If it ends during the run; its ``trace`` holds the run so far.
    """
    duration_ms = positive("duration_ms", duration_ms)
    drain_ms = duration_ms if drain_ms is None else positive("drain_ms", drain_ms)
    require(device is None or isinstance(device, Cpu), "device", device, "devices.Cpu(), or None with url")
    require(url is None or (device is None and server is None), "url", url, "None where device or server is given")
    policy = Triton() if policy is None else policy
    device = device or Cpu()
    cores, models = device.slots(), names(plan)
    wanted = settings(plan, policy, len(cores), count("seed", seed, least=0))
    recipe, arrivals = recipe_of(plan, policy), sample_arrivals(plan, duration_ms, seed)
    program = find_program(server) if url is None else None
    with contextlib.ExitStack() as stack:
        check = None
        if program is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dstack_lab_models_"))
            running = stack.enter_context(Server(program, write_repository(plan, folder, policy, len(cores), seed), cores))
            check, url = running.check, running.url
        assert url is not None
        client = Client(url, check) if check else Client(url)
        stack.callback(client.close)
        version = client.wait_ready(models, start_timeout_s, None if check else LIVE_S)
        told = [_agreed(client.told(model), want, model, url) for model, want in zip(models, wanted, strict=True)]
        marks = device.marks() if check else ()
        with progress_bar(progress, round(duration_ms / 1000, 1), "Triton server", "s") as bar:
            sent = client.drive(models, arrivals, drain_ms, _Ticker(bar, duration_ms))
    where = device.describe() if check else f"server at {url}"
    on, threads = told[0]["parameters"]["backend"], int(told[0]["parameters"]["threads"])
    mechanism = f"Triton Inference Server {version}: dynamic batches, one instance of each network, {on}, {threads} threads each"
    versions = {**versions_here("dstack-lab", "torch", "numpy", "tritonclient"), "tritonserver": version}
    provenance = Provenance("measured", where, mechanism, versions, today(), (*marks, *_lateness(sent)))
    trace = replace(
        written(plan, [*map(len, arrivals)], sent, duration_ms, threads if on == "cpu" else None, policy.name, seed, provenance),
        recipe=recipe,
    )
    if sent.error is not None:
        raise RunError(str(sent.error), trace) from sent.error
    return trace


def _agreed(told: Told, want: Told, model: str, url: str) -> Told:
    """Return what a server was told about a model, if that is what the run asks of it; where it computes is its own matter."""
    differ = {key: (told[key], want[key]) for key in ("max_batch", "delay_us") if told[key] != want[key]}
    both = (
        (key, told["parameters"].get(key), value)
        for key, value in want["parameters"].items()
        if key not in ("threads", "backend")
    )
    differ |= {key: (has, value) for key, has, value in both if has != value}
    words = "; ".join(f"{key} is {has!r}, not {value!r}" for key, (has, value) in differ.items())
    if differ:
        raise ValueError(
            f"the server at {url} serves another {model!r} ({words}): give it what write_repository writes for this run"
        )
    return told


def _lateness(sent: Sent) -> tuple[str, ...]:
    """Return a mark if the client itself was late."""
    gone = sent.sent_ns >= 0
    late_ms = float(np.quantile((sent.sent_ns - sent.due_ns)[gone], 0.99)) / NS_PER_MS if gone.any() else 0.0
    return (f"late client: 1 % of the requests left {late_ms:.1f} ms late or more",) if late_ms > LATE_MS else ()


class _Ticker:
    """Moves a progress bar to the time of the run."""

    def __init__(self, bar: Any, duration_ms: float) -> None:
        self.bar, self.last_s, self.duration_s = bar, 0.0, duration_ms / 1000

    def __call__(self, now_ms: float) -> None:
        now_s = min(now_ms / 1000, self.duration_s)
        self.bar.update(round(now_s - self.last_s, 1))
        self.last_s += round(now_s - self.last_s, 1)

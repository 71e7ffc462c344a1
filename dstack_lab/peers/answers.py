"""What a server answered, written as a `Trace`: batches are put together again from what each answer says of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.peers.client import Sent
from dstack_lab.peers.repository import ANSWER
from dstack_lab.provenance import Provenance
from dstack_lab.services import Plan
from dstack_lab.state import NS_PER_MS
from dstack_lab.trace_tables import launches_table, requests_table, services_table
from dstack_lab.traces import EVENTS, OUTCOMES, Trace


def written(
    plan: Plan,
    sizes: Sequence[int],
    sent: Sent,
    duration_ms: float,
    threads: int | None,
    policy: str,
    seed: int,
    provenance: Provenance,
) -> Trace:
    """Return the trace of a run with `sizes` requests of each service; `threads` of each network, None on a GPU."""
    service = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.full((len(service), len(ANSWER)), np.nan)
    for k, answer in enumerate(sent.answers):
        if answer is not None:
            rows[k] = answer.as_numpy("ANSWER")[0]
    told = dict(zip(ANSWER, rows.T, strict=True))
    served = np.isfinite(told["batch"])
    finish_ms = np.where(served, sent.finish_ns / NS_PER_MS, np.nan)

    # a batch of the server: all answers of a service with the same number
    pair = np.stack([service[served], told["batch"][served].astype(np.int64)], axis=1)
    batches, first, member = np.unique(pair, axis=0, return_index=True, return_inverse=True)
    member = member.reshape(-1)
    end_ms = np.full(len(batches), np.inf)
    np.minimum.at(end_ms, member, finish_ms[served])
    size, took_ms, cpu_ms = (told[name][served][first] for name in ("size", "service_ms", "cpu_ms"))
    start_ms = end_ms - took_ms
    for one in range(len(sizes)):  # one instance a service: a batch that seems to begin earlier was answered late
        mine = np.flatnonzero(batches[:, 0] == one)
        start_ms[mine[1:]] = np.minimum(np.maximum(start_ms[mine[1:]], end_ms[mine[:-1]]), end_ms[mine[1:]])
    order = np.argsort(start_ms, kind="stable")
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))

    share = np.full(len(order), 100.0) if threads is None else np.minimum(100 * cpu_ms / (took_ms * threads), 100)
    launches = launches_table(
        plan,
        np.arange(len(order)),
        batches[order, 0],
        start_ms[order],
        end_ms[order],
        share[order],
        size[order].astype(np.int64),
        np.zeros(len(order), dtype=np.int64),
        [""],
    )
    launches["worker_ms"] = took_ms[order]
    launch = np.full(len(service), -1, dtype=np.int32)
    launch[served] = number[member]
    began_ms = np.full(len(service), np.nan)
    began_ms[served] = start_ms[member]
    outcome = np.full(len(service), OUTCOMES.index("unserved"), dtype=np.int8)
    outcome[served] = OUTCOMES.index("served")
    outcome[[*sent.errors]] = OUTCOMES.index("dropped")
    requests = requests_table(plan, sizes, sent.due_ns / NS_PER_MS, began_ms, finish_ms, launch, outcome)
    requests["answer"] = np.where(served, told["class"], -1).astype(np.int64)
    requests["score"] = told["score"]
    events = pd.DataFrame(_events(plan, service, sent), columns=list(EVENTS))
    return Trace(services_table(plan), requests, launches, duration_ms, policy, seed, provenance, events)


def _events(plan: Plan, service: NDArray[np.int64], sent: Sent) -> list[tuple[float, str, str, str]]:
    """One event for each service and kind of failure, at the first of them; one for what was not awaited."""
    found: dict[tuple[str, str], float] = {}
    times: Counter[tuple[str, str]] = Counter()
    for k, message in sent.errors.items():
        key = plan.services[service[k]].name, message
        found.setdefault(key, float(sent.finish_ns[k] / NS_PER_MS))
        times[key] += 1
    events = [(at, "failed", name, f"{times[name, message]} requests: {message}") for (name, message), at in found.items()]
    if sent.open:
        words = str(sent.error) if sent.error else "at the end of the drain time"
        events.append((sent.ended_ns / NS_PER_MS, "stopped", "", f"{sent.open} requests had no answer yet: {words}"))
    return sorted(events)

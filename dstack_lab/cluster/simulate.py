"""A placement simulated: every GPU by itself, on the requests that its replicas are sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.checks import count, positive, require
from dstack_lab.cluster.dispatch import Dispatch, RoundRobin
from dstack_lab.cluster.placement import Placement
from dstack_lab.contention import Contention
from dstack_lab.ledger import PolicyError
from dstack_lab.policies.base import Policy
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.temporal import Temporal
from dstack_lab.provenance import Provenance
from dstack_lab.services import InfeasiblePlan
from dstack_lab.simulator import simulate
from dstack_lab.traces import OUTCOMES, Trace
from dstack_lab.variability import Variability

Array = NDArray[np.float64]

#: Streams of random numbers beside those of the arrivals (no tag) and of the simulator's service times (1).
DISPATCH_STREAM, GPU_STREAM = 2, 3


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """Arrivals of a replica: the requests it was sent, which may be none, at the rate it is planned for.

    Parameters
    ----------
    times_ms : numpy.ndarray, shape (n,)
        Ascending [ms].
    rate_rps : float
        Planned [requests/s].
    """

    times_ms: Array
    rate_rps: float

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Array:
        """Return the times below `duration_ms` [ms]; `rng` is not used."""
        return self.times_ms[self.times_ms < positive("duration_ms", duration_ms)]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterTrace:
    """One run of a placement.

    Parameters
    ----------
    placement : Placement
    traces : dict of str to Trace
        By name of the GPU; one that serves nothing has none. ``rate_rps`` there is the replica's.
    duration_ms : float
    seed : int
    dispatch : str
        Name of the dispatcher.
    """

    placement: Placement
    traces: dict[str, Trace]
    duration_ms: float
    seed: int
    dispatch: str

    @property
    def requests(self) -> pd.DataFrame:
        """Requests of all GPUs by service and arrival, as in `Trace`, with a column ``gpu``; ``launch`` is that of `launches`."""
        table = self._joined("requests")
        order = np.lexsort((table["arrival_ms"], table["service"].cat.codes))
        return table.iloc[order].reset_index(drop=True)

    @property
    def launches(self) -> pd.DataFrame:
        """Launches of all GPUs by start, as in `Trace`, with a column ``gpu``; ``gpu_pct`` is of that GPU."""
        return self._joined("launches").sort_values("start_ms", kind="stable", ignore_index=True)

    def merged(self) -> Trace:
        """Return one trace of the whole cluster, for `summary` and figures.

        In its launches ``gpu_pct`` and ``knee_pct`` are parts of the *cluster*: those of the GPU divided by the number of
        GPUs, idle ones too. So the utilization that `summary` tells is the mean over GPUs, each counted alike
        whatever it can do, and launches that run at once hold at most 100 % together.
        """
        gpus = len(self.placement.cluster)
        launches = self.launches
        launches[["gpu_pct", "knee_pct"]] /= gpus
        services = pd.DataFrame(
            [{"service": s.name, "model": s.model, "slo_ms": s.slo_ms, "rate_rps": s.rate_rps} for s in self.placement.services]
        )
        events = [t.events.assign(gpu=g) for g, t in self.traces.items() if len(t.events)]
        parts = [t.provenance for t in self.traces.values()]
        marks = dict.fromkeys(mark for part in parts for mark in part.marks)
        own = (f"{self.placement.method} placement, {self.dispatch}", f"GPU% of the {gpus} GPUs together")
        made = Provenance(
            "simulated",
            f"cluster of {self.placement.cluster.device}",
            "model",
            parts[0].versions,
            max(part.date for part in parts),
            (*marks, *own),
        )
        first = next(iter(self.traces.values()))
        rest = {"events": pd.concat(events, ignore_index=True)} if events else {}
        return Trace(services, self.requests, launches, self.duration_ms, first.policy, self.seed, made, **rest)

    def _joined(self, table: str) -> pd.DataFrame:
        names = [s.name for s in self.placement.services]
        columns: dict[str, list[str]] = {"service": names, "outcome": list(OUTCOMES), "gpu": list(self.placement.cluster.names)}
        parts, begin = [], 0
        for gpu, trace in self.traces.items():
            part: pd.DataFrame = getattr(trace, table).assign(gpu=gpu)
            part["launch"] = part["launch"].where(part["launch"] < 0, part["launch"] + begin)
            begin += int(trace.launches["launch"].max()) + 1 if len(trace.launches) else 0
            for column in part.columns.intersection(list(columns)):
                part[column] = pd.Categorical(part[column], columns[column])
            if table == "launches":
                part["note"] = part["note"].astype(object)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)


def simulate_cluster(
    placement: Placement,
    policy: Policy | Callable[[], Policy] | None = None,
    duration_ms: float = 10_000.0,
    seed: int = 0,
    dispatch: Dispatch | None = None,
    *,
    variability: Variability | None = None,
    contention: Contention | None = None,
) -> ClusterTrace:
    """Simulate a placement: requests are sent to replicas as they arrive, then every GPU runs by itself.

    Parameters
    ----------
    placement : Placement
        Of `place`.
    policy : Policy, or class or function that makes one, optional
        On every GPU; by default `DStack` for a placement by ``dstack``, else `Temporal`; both drop what is too late
        if the placement was planned for a part of the rates.
    duration_ms : float
        Requests arrive in [0, duration_ms).
    seed : int
        The same seed gives the same requests whatever the placement, those that `simulate` would give on one GPU.
    dispatch : RoundRobin, Random or LeastWork, optional
        Round robin by default.
    variability, contention : optional
        As in `simulate`; service times scatter independently on each GPU.

    Returns
    -------
    ClusterTrace

    Raises
    ------
    ValueError
        If an argument is out of range.
    InfeasiblePlan, PolicyError
        As in `simulate`; the message names the GPU.
    """
    require(isinstance(placement, Placement), "placement", type(placement).__name__, "a Placement of lab.place")
    positive("duration_ms", duration_ms)
    count("seed", seed, least=0)
    dispatch = RoundRobin() if dispatch is None else dispatch
    usable = isinstance(dispatch, Dispatch) and not isinstance(dispatch, type)
    require(usable, "dispatch", dispatch, "a dispatcher such as RoundRobin()")
    if policy is None:
        drop = placement.planned < 1
        policy = DStack(reject=drop) if placement.method == "dstack" else Temporal(drop_late=drop)
    sent = _sent(placement, duration_ms, seed, dispatch)
    traces = {}
    for index, gpu in enumerate(placement.cluster.names):
        if gpu not in placement.plans:
            continue
        plan = placement.plans[gpu]
        plan = replace(plan, services=tuple(replace(s, arrivals=sent[gpu, s.name]) for s in plan.services))
        mine = policy if isinstance(policy, Policy) else policy()
        # service times of their own on each GPU; arrivals do not depend on it
        own = int(np.random.SeedSequence([seed, GPU_STREAM, index]).generate_state(1)[0])
        try:
            trace = simulate(plan, mine, duration_ms, own, variability, contention)
        except PolicyError as error:
            raise PolicyError(f"{gpu}: {error}", error.trace) from error
        except InfeasiblePlan as error:
            raise InfeasiblePlan(f"{gpu}: {error}") from error
        traces[gpu] = replace(trace, seed=seed)
    return ClusterTrace(placement, traces, float(duration_ms), seed, type(dispatch).__name__)


def _sent(placement: Placement, duration_ms: float, seed: int, dispatch: Dispatch) -> dict[tuple[str, str], Sent]:
    """Requests of each (GPU, service)."""
    found = {}
    demand = placement.demand_pct
    streams = np.random.SeedSequence(seed).spawn(len(placement.services))  # those of the simulator
    draws = np.random.SeedSequence([seed, DISPATCH_STREAM]).spawn(len(placement.services))
    for service, stream, draw in zip(placement.services, streams, draws, strict=True):
        times = service.arrivals.sample(duration_ms, np.random.default_rng(stream))
        replicas = placement.of(service.name)
        rates = [r.rate_rps for r in replicas]
        full = [r.rate_rps * 100 / demand[r.gpu] for r in replicas]
        chosen = np.asarray(dispatch.assign(times, rates, full, np.random.default_rng(draw)))
        good = chosen.shape == times.shape and bool(((chosen >= 0) & (chosen < len(replicas))).all())
        require(good, "replicas chosen by dispatch", chosen, f"one of 0 to {len(replicas) - 1} for each of {times.size} requests")
        for k, replica in enumerate(replicas):
            found[replica.gpu, service.name] = Sent(times[chosen == k], replica.rate_rps)
    return found

"""What the books of a run become: the columns of a `Trace`, the same from the ledger and from a compiled run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.services import Plan
from dstack_lab.traces import OUTCOMES


def coded(codes: NDArray[Any], names: Iterable[str]) -> pd.Categorical:
    """Return names by code, at one or two bytes each."""
    return pd.Categorical.from_codes(codes.tolist() if codes.size == 0 else codes, pd.Index(list(names), dtype=object))


def services_table(plan: Plan) -> pd.DataFrame:
    """One row a service: name, model, SLO [ms], mean rate [requests/s]."""
    return pd.DataFrame(
        [{"service": s.name, "model": s.model, "slo_ms": s.slo_ms, "rate_rps": s.rate_rps} for s in plan.services]
    )


def launches_table(
    plan: Plan,
    number: NDArray[Any],
    service: NDArray[Any],
    start_ms: NDArray[np.float64],
    end_ms: NDArray[np.float64],
    gpu_pct: NDArray[np.float64],
    batch: NDArray[np.int64],
    note: NDArray[Any],
    notes: Iterable[str],
) -> pd.DataFrame:
    """One row a launch; `service` and `note` are positions, the other columns are taken as they are, not copied."""
    columns = {
        "launch": number,
        "service": coded(service, [s.name for s in plan.services]),
        "start_ms": start_ms,
        "end_ms": end_ms,
        "gpu_pct": gpu_pct,
        "batch": batch,
        "knee_pct": _knees(plan, service, batch),
        "note": coded(note, notes),
    }
    return pd.DataFrame(columns, copy=False)


def requests_table(
    plan: Plan,
    sizes: Iterable[int],
    arrival_ms: NDArray[np.float64],
    start_ms: NDArray[np.float64],
    finish_ms: NDArray[np.float64],
    launch: NDArray[np.int32],
    outcome: NDArray[np.int8],
) -> pd.DataFrame:
    """One row a request, service after service, `sizes` requests each; columns are taken as they are, not copied."""
    names = [s.name for s in plan.services]
    columns = {
        "service": coded(np.repeat(np.arange(len(names), dtype=np.int8), list(sizes)), names),
        "arrival_ms": arrival_ms,
        "start_ms": start_ms,
        "finish_ms": finish_ms,
        "launch": launch,
        "outcome": coded(outcome, OUTCOMES),
    }
    return pd.DataFrame(columns, copy=False)


def _knees(plan: Plan, service: NDArray[Any], batch: NDArray[np.int64]) -> NDArray[np.float64]:
    """Knee of each launch's batch [GPU%], computed once per service and batch."""
    width = max(table.batch_max for table in plan.tables) + 1
    pair = service * width
    pair += batch
    knees = np.full(len(plan.services) * width, np.nan)
    for used in np.flatnonzero(np.bincount(pair, minlength=1)):
        knees[used] = plan.tables[used // width].knee_pct(int(used % width))
    return np.asarray(knees[pair], dtype=np.float64)

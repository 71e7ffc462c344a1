"""Small plans that tests share."""

from __future__ import annotations

import numpy as np
import pandas as pd

import dstack_lab as lab
from dstack_lab.services import ServiceTable

SIMULATED = lab.Provenance("simulated", "toy GPU", "model")


def table(fixed_ms: float = 1.0, per_item_ms: float = 0.5, knee_pct: float = 40.0, batch_max: int = 16) -> ServiceTable:
    """L(b, g) = (fixed + b · per_item) · max(1, knee/g)."""
    batch, share = np.arange(1, batch_max + 1)[:, None], np.arange(1, 101)[None, :]
    return ServiceTable((fixed_ms + batch * per_item_ms) * np.maximum(1, knee_pct / share))


def plan(*points, shares=(25.0, 50.0, 75.0, 100.0)):
    """Plan from (name, slo_ms, arrivals, gpu_pct, batch, ServiceTable) tuples."""
    services = tuple(lab.Service(name, slo, arrivals) for name, slo, arrivals, *_ in points)
    allocations = tuple(
        lab.Allocation(name, share, batch, times.at(batch, share), arrivals.rate_rps)
        for name, _, arrivals, share, batch, times in points
    )
    return lab.Plan(services, allocations, tuple(p[5] for p in points), tuple(shares), "test", SIMULATED)


def profile(**models) -> lab.Profile:
    """Profile from name=(fixed_ms, per_item_ms, knee_pct), on a grid of batches and shares."""
    rows = [
        {"model": name, "batch": b, "gpu_pct": g, "service_ms": (fixed + b * item) * max(1, knee / g)}
        for name, (fixed, item, knee) in models.items()
        for b in (1, 2, 4, 8, 16)
        for g in range(10, 101, 10)
    ]
    return lab.Profile(pd.DataFrame(rows), SIMULATED)

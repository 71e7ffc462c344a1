"""dstack_lab: see, measure and teach how several neural networks share one GPU.

Five nouns: a `Profile` (service times by network, batch and GPU%), a `Service` (network, SLO and
arrivals), a `Plan` (share and batch of each service), a policy (who runs when) and a `Trace` (what
happened). Importing the package loads neither torch nor plotly.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: Public name -> module that holds it.
_HOMES = {
    "arrivals": ("Deterministic", "Drift", "Gamma", "Poisson", "Replay", "Steps"),
    "variability": ("Exponential", "Lognormal"),
    "profiles": ("Profile", "load_profile"),
    "provenance": ("Provenance",),
    "traces": ("Trace", "load_trace"),
    "services": ("Allocation", "InfeasiblePlan", "Plan", "Service"),
    "gpu_model": ("fit",),
    "metrics": ("jain", "summary"),
    "bounds": ("bound",),
    "optimizer": ("optimize", "sensitivity"),
    "contention": ("Contention",),
    "policies": (
        *("Clipper", "DStack", "Gpulet", "Gslice", "Ideal", "MaxMin", "MaxThroughput", "Nexus", "Temporal", "Triton"),
        *("AdaptiveDStack", "Drop", "Launch", "Policy", "Uncontrolled", "Wake", "plan_period", "cut_slots", "try_slots"),
    ),
    "simulator": ("simulate",),
    "ledger": ("PolicyError",),
    "workloads": ("scaled", "workload"),
    "experiments": ("compare", "sweep"),
    "ablation": ("ablate",),
    "capacity": ("MaxLoad", "max_load"),
    "ceilings": ("Ceiling", "ceiling"),
    "validation": ("validate",),
    "cluster": ("Cluster", "LeastWork", "Placement", "Random", "RoundRobin", "cluster_bound", "place", "simulate_cluster"),
    "profiler": ("measure",),
    "runner": ("RunError", "run"),
}
_MODULES = ("devices", "exercises", "figures", "gpu_specs", "kernel_model", "kernels", "panels", "peers", "policies", "zoo")
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

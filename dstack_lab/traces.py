"""Traces: what happened to every request and every launch, simulated or on hardware, in one schema."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.checks import positive, require
from dstack_lab.files import whole_file
from dstack_lab.provenance import Provenance

OUTCOMES = ("served", "dropped", "unserved")
SERVICES = ("service", "model", "slo_ms", "rate_rps")
REQUESTS = ("service", "arrival_ms", "start_ms", "finish_ms", "launch", "outcome")
LAUNCHES = ("launch", "service", "start_ms", "end_ms", "gpu_pct", "batch", "knee_pct", "note")
EVENTS = ("time_ms", "kind", "service", "detail")
SAMPLES = (
    *("time_ms", "power_w", "energy_j", "clock_mhz", "memory_mib", "throttled"),
    *("sm_util_pct", "sm_occupancy_pct", "dram_util_pct"),
)
_TABLES = {"services": SERVICES, "requests": REQUESTS, "launches": LAUNCHES, "events": EVENTS, "samples": SAMPLES}


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One run of a policy.

    Parameters
    ----------
    services : pandas.DataFrame
        One row per service: ``service``, ``model``, ``slo_ms``, ``rate_rps``.
    requests : pandas.DataFrame
        One row per request, by service and arrival: ``service`` (categorical), ``arrival_ms``,
        ``start_ms`` and ``finish_ms`` (NaN if never served), ``launch`` (-1 if none),
        ``outcome`` (served, dropped or unserved).
    launches : pandas.DataFrame
        One row per launch: ``launch``, ``service``, ``start_ms``, ``end_ms``, ``gpu_pct``, ``batch``,
        ``knee_pct`` (knee of that batch) and ``note`` (the policy's word for it).
    duration_ms : float
        Requests arrive in [0, duration_ms); what still waits then is served afterwards.
    policy : str
        Name of the policy.
    seed : int
        Seed of the arrivals.
    provenance : Provenance
    events : pandas.DataFrame, optional
        Faults and other news: ``time_ms``, ``kind``, ``service``, ``detail``.
    samples : pandas.DataFrame, optional
        What NVML said of a real GPU during the run, a few rows a second, NaN where it said nothing:
        ``time_ms``, ``power_w``, ``energy_j`` (ever growing), ``clock_mhz``, ``memory_mib``, ``throttled``
        (0 or 1); of GPM, means since the row before: ``sm_util_pct``, ``sm_occupancy_pct``, ``dram_util_pct``.
    recipe : dict, optional
        Plan and policy of a run on hardware (see `recipes`), so that `validate` can simulate the same.
    """

    services: pd.DataFrame
    requests: pd.DataFrame
    launches: pd.DataFrame
    duration_ms: float
    policy: str
    seed: int
    provenance: Provenance
    events: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({c: [] for c in EVENTS}))
    samples: pd.DataFrame = field(default_factory=lambda: pd.DataFrame({c: np.array([], dtype=float) for c in SAMPLES}))
    recipe: Any = None

    def __post_init__(self) -> None:
        positive("duration_ms", self.duration_ms)
        for name, columns in _TABLES.items():
            table = getattr(self, name)
            require(isinstance(table, pd.DataFrame), name, type(table).__name__, "a pandas DataFrame")
            require(set(columns) <= set(table.columns), f"{name} columns", list(table.columns), f"at least {list(columns)}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one compressed ``.npz`` file; it is whole or absent."""
        target = Path(path).with_suffix(".npz")
        head = {
            "format": "dstack_lab trace 1",
            "duration_ms": self.duration_ms,
            "policy": self.policy,
            "seed": self.seed,
            "provenance": self.provenance.to_dict(),
        }
        if self.recipe is not None:
            head["recipe"] = {key: value for key, value in self.recipe.items() if key != "tables"}
        arrays: dict[str, Any] = {"head": np.array(json.dumps(head))}
        for i, table in enumerate((self.recipe or {}).get("tables", ())):
            arrays[f"recipe.{i}"] = table
        for name in _TABLES:
            for column, values in getattr(self, name).items():
                arrays[f"{name}.{column}"] = _plain(values)
        with whole_file(target) as temporary, open(temporary, "wb") as out:
            np.savez_compressed(out, **arrays)
        return target

    def to_chrome(self, path: str | os.PathLike[str]) -> Path:
        """Write the launches as a Chrome trace, for Perfetto or chrome://tracing; times there are in µs.

        A service has a row, and further ones for its launches beside others of its own.
        """
        events = []
        rows: dict[str, list[float]] = {}  # service -> when each of its rows is free
        for launch, name, start, end, share, batch, _, note in self.launches[list(LAUNCHES)].sort_values("start_ms").to_numpy():
            args = {"gpu_pct": float(share), "batch": int(batch), "launch": int(launch)}
            free = rows.setdefault(name, [])
            row = next((i for i, since in enumerate(free) if since <= start), len(free))
            free[row : row + 1] = [end]
            event = {
                "name": f"{name} b{batch}",
                "cat": note or "launch",
                "ph": "X",
                "ts": start * 1000,
                "dur": (end - start) * 1000,
            }
            events.append({**event, "pid": self.policy, "tid": f"{name} ({row + 1})" if row else name, "args": args})
        record = {"traceEvents": events, "otherData": {"provenance": str(self.provenance), "seed": self.seed}}
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        return Path(path)


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Load a trace.

    Parameters
    ----------
    path : str or path
        An ``.npz`` file that `Trace.save` wrote.

    Raises
    ------
    ValueError
        If the file is missing, damaged or of another format.
    """
    source = Path(path)
    require(source.is_file(), "trace", str(path), "an existing .npz file")
    try:
        with open(source, "rb") as whole, np.load(whole, allow_pickle=False) as data:  # numpy leaves a damaged file open
            head = json.loads(str(data["head"]))
            require(head.get("format") == "dstack_lab trace 1", "format", head.get("format"), "'dstack_lab trace 1'")
            tables: dict[str, dict[str, Any]] = {name: {} for name in _TABLES}
            times = [data[f"recipe.{i}"] for i in range(sum(key.startswith("recipe.") for key in data.files))]
            for key in data.files:
                if key != "head" and not key.startswith("recipe."):
                    table, column = key.split(".", 1)
                    tables[table][column] = _categories(data[key])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"trace {source.name}: must be a whole file written by Trace.save ({error})") from error
    frames = {name: pd.DataFrame(columns) for name, columns in tables.items() if columns}  # older files have no samples
    return Trace(
        duration_ms=head["duration_ms"],
        policy=head["policy"],
        seed=head["seed"],
        provenance=Provenance.from_dict(head["provenance"]),
        recipe={**head["recipe"], "tables": times} if "recipe" in head else None,
        **frames,
    )


def _plain(values: pd.Series) -> np.ndarray:
    """Return a column as an array that needs no pickle: texts become fixed-width unicode."""
    array = values.to_numpy()
    return array if array.dtype.kind in "biuf" else array.astype("U")


def _categories(array: np.ndarray) -> Any:
    return pd.Categorical(array) if array.dtype.kind == "U" and array.size > len(np.unique(array)) else array

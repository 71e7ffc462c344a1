"""Item 2: service time by network, batch and GPU%, on every mechanism, with CUDA graphs and eagerly."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from dstack_lab.agenda.ahead import Ahead
from dstack_lab.agenda.record import Record, Step
from dstack_lab.agenda.target import Target
from dstack_lab.devices import Device
from dstack_lab.profiler import measure
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance

#: Batches of the eager sweep.
EAGER_BATCHES = (1, 16)
SECONDS_PER_POINT = 1.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """One way to run the networks.

    Parameters
    ----------
    table : str
        Its table: ``"mps"``, ``"mps-eager"``.
    mechanism : str
    batches : tuple of int
    options : dict
        Of the device.
    """

    table: str
    mechanism: str
    batches: tuple[int, ...]
    options: dict[str, Any]


def sweeps(target: Target) -> list[Sweep]:
    """The ways to run the networks, the reference first."""
    graphs = {"precision": "fp16", "channels_last": True, "graphs": True}
    eager = {"precision": "fp32", "channels_last": True, "graphs": False}
    found = []
    for mechanism in target.mechanisms:
        found.append(Sweep(mechanism, mechanism, target.batches, graphs if target.on_gpu else {}))
    eager_batches = tuple(b for b in EAGER_BATCHES if b in target.batches)
    found += [Sweep(f"{m}-eager", m, eager_batches, eager) for m in target.mechanisms if target.on_gpu]
    return found


def device_for(target: Target, sweep: Sweep) -> tuple[Device, tuple[str, ...]]:
    """Return the device of a sweep, and what of its options the device does not have."""
    kind = type(target.device(sweep.mechanism))
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    lacking = tuple(f"{name}={value}" for name, value in sweep.options.items() if name not in known)
    return target.device(sweep.mechanism, **{k: v for k, v in sweep.options.items() if k in known}), lacking


def run(target: Target, record: Record) -> None:
    """Measure what is left of every sweep."""
    with contextlib.ExitStack() as stack:
        steps: list[Step] = []
        for sweep in sweeps(target):
            device, lacking = device_for(target, sweep)
            points = [(model, share) for model in target.models for share in target.shares(device)]
            left = [p for p in points if record.steps.get(_name(sweep, *p), {}).get("state") != "done"]
            batches: dict[str, Any] = (
                {"batches": sweep.batches} if sweep.mechanism == "green" else {}
            )  # its graphs are captured at the start
            bench = stack.enter_context(Ahead(device, left, **batches)) if target.on_gpu else device
            steps += [Step(_name(sweep, *p), _unit(target, record, sweep, bench, lacking, *p), 30) for p in points]
        record.run(steps)


def _name(sweep: Sweep, model: str, share: float) -> str:
    return f"{sweep.table} {model} {share:g} %"


def _unit(target: Target, record: Record, sweep: Sweep, bench: Any, lacking: tuple[str, ...], model: str, share: float) -> Any:
    def work() -> dict[str, Any]:
        profile = measure(
            model,
            bench,
            sweep.batches,
            [share],
            progress=False,
            seconds_per_point=0.2 if target.quick else SECONDS_PER_POINT,
            timeout_s=max(30.0, min(240.0, record.left_s)),
        )
        origin = profile.provenance
        marks = (*origin.marks, *(f"not as asked: {text} is not an option of {origin.mechanism}" for text in lacking))
        save(record, sweep.table, profile, marks, _name(sweep, model, share))
        return {"points": len(profile.table), "marks": list(marks)}

    return work


def save(record: Record, table: str, profile: Profile, marks: tuple[str, ...], step: str) -> None:
    """Add a profile's rows to a table, which is a profile file that `load_profile` reads."""
    old = record.table(table)
    rows = profile.table.assign(step=step)
    if old is not None:
        rows = pd.concat([old[old["step"] != step], rows], ignore_index=True)
    rows["mark"] = rows["mark"].fillna("")
    mine = record.provenance
    known = [mark for entry in record.steps.values() for mark in (entry.get("value") or {}).get("marks", [])]
    every = tuple(dict.fromkeys([*known, *marks]))
    origin = Provenance(
        "measured", profile.provenance.device, profile.provenance.mechanism, mine.versions, profile.provenance.date, every
    )
    Profile(rows, origin, strict=False).save(record.table_path(table))

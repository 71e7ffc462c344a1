"""Kernels measured on a GPU: read from the Chrome trace that torch.profiler exports."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from math import isfinite, prod
from pathlib import Path
from typing import Any

import pandas as pd

from dstack_lab.checks import count, require
from dstack_lab.kernels import LINEAR, Kernels

#: What one SM holds at most where the trace does not say: any data-centre GPU since Volta (CUDA C++
#: Programming Guide, "Technical Specifications per Compute Capability").
SM_THREADS, SM_BLOCKS, SM_REGISTERS = 2048, 32, 65536

CURE = "record one forward pass with torch.profiler (activities CPU and CUDA) and export_chrome_trace"


def from_trace(source: str | os.PathLike[str] | Mapping[str, Any], batch: int, name: str | None = None) -> Kernels:
    """Kernels of one forward pass, as they ran.

    Parameters
    ----------
    source : path or mapping
        The JSON file (also ``.json.gz``) that ``torch.profiler.profile(...).export_chrome_trace``
        wrote, or its content. Its kernel events carry grid, block and duration [us].
    batch : int
        The batch that ran.
    name : str, optional
        The network's name; the file's otherwise.

    Returns
    -------
    Kernels
        With ``units`` (blocks of the grid), ``resident``, ``work_us`` and ``gap_us`` (idle time
        before it, 0 if none); FLOPs and bytes are NaN. It knows only this batch.

    Raises
    ------
    ValueError
        If the file cannot be read, or holds no kernel event, or a damaged one.
    """
    batch = count("batch", batch)
    if isinstance(source, Mapping):
        content, called = source, "trace"
    else:
        content, called = _read(Path(source)), Path(source).name.split(".")[0]
    events = content.get("traceEvents") if isinstance(content, Mapping) else None
    require(isinstance(events, list), "trace", type(events).__name__, f"a mapping with a list 'traceEvents': {CURE}")
    assert events is not None
    ran = [e for e in events if isinstance(e, Mapping) and e.get("cat") == "kernel"]
    require(bool(ran), "kernel events in the trace", 0, f"1 or more: {CURE}")
    devices = content.get("deviceProperties")
    device = devices[0] if isinstance(devices, list) and devices and isinstance(devices[0], Mapping) else {}
    rows = [_kernel(event, device) for event in sorted(ran, key=lambda e: _number(e, "ts"))]
    labels = pd.DataFrame(rows)
    busy_until = (labels["ts"] + labels["work_us"]).cummax().shift()
    labels["gap_us"] = (labels["ts"] - busy_until).clip(lower=0).fillna(0.0)
    unknown = pd.DataFrame(float("nan"), index=labels.index, columns=list(LINEAR))
    labels = labels.drop(columns="ts")
    sms = device.get("numSms")
    return Kernels(
        name or called,
        unknown,
        unknown * 0,
        labels,
        only_batch=batch,
        traced_sms=sms if isinstance(sms, int) and sms > 0 else None,
    )


def _read(path: Path) -> Any:
    require(path.is_file(), "trace", str(path), f"an existing file: {CURE}")
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"trace = {str(path)!r}: must be readable JSON ({error}): {CURE}") from error


def _number(event: Mapping[str, Any], key: str) -> float:
    value = event.get(key)
    good = isinstance(value, (int, float)) and isfinite(value)
    require(good, f"{key} of kernel {str(event.get('name'))[:60]!r}", value, "a finite number")
    return float(value)  # type: ignore[arg-type]


def _whole(record: Mapping[str, Any], key: str, default: int) -> int:
    value = record.get(key)
    return value if isinstance(value, int) and value > 0 else default


def _kernel(event: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, Any]:
    name = str(event.get("name", "kernel"))
    work_us = _number(event, "dur")
    require(work_us > 0, f"dur of kernel {name[:60]!r}", work_us, "above 0 us")
    args = event.get("args")
    args = args if isinstance(args, Mapping) else {}
    sizes = []
    for key in ("grid", "block"):
        size = args.get(key)
        good = isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n >= 1 for n in size)
        require(good, f"{key} of kernel {name[:60]!r}", size, "three integers, 1 or more")
        sizes.append(prod(size))  # type: ignore[arg-type]
    grid, threads = sizes
    held = [SM_BLOCKS, _whole(device, "maxThreadsPerMultiprocessor", SM_THREADS) // threads]
    if registers := _whole(args, "registers per thread", 0):
        held.append(_whole(device, "regsPerMultiprocessor", SM_REGISTERS) // (registers * threads))
    if (shared := _whole(args, "shared memory", 0)) and (room := _whole(device, "sharedMemPerMultiprocessor", 0)):
        held.append(room // shared)
    return {
        "operator": name,
        "kind": "traced",
        "fused": name,
        "winograd": False,
        "units": grid,
        "resident": max(min(held), 1),
        "ts": _number(event, "ts"),
        "work_us": work_us,
    }

"""Item 3: each kernel of a network as it ran: how long, how many blocks of how many threads, how many waves."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.agenda.probe import child
from dstack_lab.agenda.record import Record, Step
from dstack_lab.agenda.target import Target
from dstack_lab.chrome_trace import from_trace

BATCHES = (1, 16)
NEEDS_GPU = "kernels need a GPU: torch.profiler records grid, block and duration of CUDA kernels only; pass --device gpu"


def run(target: Target, record: Record) -> None:
    """Trace what is left, each network and batch in a process of its own, on the whole GPU.

    Raises
    ------
    RuntimeError
        Without a GPU.
    """
    if not target.on_gpu:
        raise RuntimeError(NEEDS_GPU)
    pairs = [(model, batch) for batch in BATCHES for model in target.models]
    record.run([Step(f"{model}, batch {batch}", _unit(record, model, batch), 60) for model, batch in pairs])


def _unit(record: Record, model: str, batch: int) -> Any:
    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{model}-b{batch}.json.gz"
            found = child("trace", model=model, batch=batch, path=str(path))
            table = kernel_table(path, batch)
            record.pack("traces", path.name, path.read_bytes())
        record.add("kernels", table.assign(model=model, batch=batch), f"{model}, batch {batch}")
        busy_us, idle_us = float(table["us"].sum()), float(table["gap_us"].sum())
        return {**found, "kernels": len(table), "busy_us": busy_us, "idle_us": idle_us}

    return work


def slim(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of an exported trace tells about kernels: a hundredth of it; `from_trace` reads it as it reads the whole.

    Raises
    ------
    RuntimeError
        If it holds no kernel.
    """
    kernels = [event for event in content["traceEvents"] if event.get("cat") == "kernel"]
    if not kernels:
        raise RuntimeError("no kernel records: CUPTI is not available here, or another profiler holds it")
    return {"traceEvents": kernels, "deviceProperties": content.get("deviceProperties", [])}


def kernel_table(source: str | Path | Mapping[str, Any], batch: int) -> pd.DataFrame:
    """One row per kernel, in order of time.

    Parameters
    ----------
    source : path or mapping
        The Chrome trace that torch.profiler exported, or its content; also gzipped.
    batch : int
        The batch that ran.

    Returns
    -------
    pandas.DataFrame
        ``name``; ``us`` (duration), ``gap_us`` (idle time before it); ``grid``, ``block`` (as ``XxYxZ``), ``blocks``,
        ``threads`` (of one block); ``resident`` (blocks that an SM holds at once, see `from_trace`); ``waves``: blocks over
        those that all SMs hold at once, NaN if the trace does not tell the number of SMs; ``regs`` (of a
        thread), ``smem`` [bytes of a block], NaN if not told.

    Raises
    ------
    ValueError
        As `from_trace`.
    """
    kernels = from_trace(source, batch)  # refuses what is damaged
    content = source if isinstance(source, Mapping) else _read(Path(source))
    events = sorted([e for e in content["traceEvents"] if e.get("cat") == "kernel"], key=lambda e: float(e["ts"]))
    ran = kernels.at(batch)
    args = [event["args"] for event in events]
    table = pd.DataFrame({"name": ran["operator"], "us": ran["work_us"], "gap_us": ran["gap_us"]})
    table["grid"] = ["x".join(map(str, a["grid"])) for a in args]
    table["block"] = ["x".join(map(str, a["block"])) for a in args]
    table["blocks"] = ran["units"]
    table["threads"] = [prod(a["block"]) for a in args]
    table["resident"] = ran["resident"]
    table["waves"] = table["blocks"] / (table["resident"] * (kernels.traced_sms or np.nan))
    table["regs"] = [a.get("registers per thread", np.nan) for a in args]
    table["smem"] = [a.get("shared memory", np.nan) for a in args]
    return table


def _read(path: Path) -> Any:
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)


def trace(model: str, batch: int, path: str) -> dict[str, Any]:
    """In a process of its own: run a network eagerly once more, now recorded; write its kernels to `path`, gzipped."""
    from dstack_lab.devices.green_driver import torch_with_cuda

    torch = torch_with_cuda()
    from torch.profiler import ProfilerActivity, profile

    from dstack_lab import zoo

    network = zoo.load(model, device="cuda")
    form: Any = {"memory_format": torch.channels_last}
    module = network.module.half().to(**form)
    inputs = [t.half() if t.is_floating_point() else t for t in (tensor.cuda() for tensor in network.example(batch))]
    inputs = [t.contiguous(**form) if t.dim() == 4 else t for t in inputs]
    with torch.inference_mode():
        for _ in range(3):
            module(*inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            module(*inputs)
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(whole))
        content = slim(json.loads(whole.read_text(encoding="utf-8")))
    Path(path).write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    return {"precision": "fp16", "channels_last": True, "sms": torch.cuda.get_device_properties(0).multi_processor_count}

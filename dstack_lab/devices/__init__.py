"""Where shares are real: each device hands out workers at a GPU%."""

from __future__ import annotations

import importlib
from typing import Any

from dstack_lab.devices.base import Device, Worker, WorkerDied, WorkerError, WorkerFailed, WorkerTimeout
from dstack_lab.devices.cpu import Cpu
from dstack_lab.devices.probe import Probe, probe  # at once: the file of the same name would hide the function later

#: Names for a GPU machine -> the file that holds them; imported when first used.
_HOME = {
    "Green": "green",
    "GreenError": "green_driver",
    "Mps": "mps",
    "MpsError": "mps_daemon",
    "SmLedger": "green_ledger",
    "verify_disjoint": "green_smid",
}

__all__ = ["Cpu", "Device", "Probe", "Worker", "WorkerDied", "WorkerError", "WorkerFailed", "WorkerTimeout", "probe", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

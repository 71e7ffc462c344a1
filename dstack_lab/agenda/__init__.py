"""What is to be measured on a real GPU, item by item: ``python -m dstack_lab measure --agenda ITEM --out DIR``.

Each call ends within its minutes and goes on where the one before stopped. Needs torch, numpy, scipy,
pandas, nvidia-ml-py and cuda-bindings only; changes no setting of the card.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from dstack_lab.agenda import ticks
from dstack_lab.agenda.record import Record
from dstack_lab.agenda.target import Target
from dstack_lab.checks import require
from dstack_lab.files import data_folder
from dstack_lab.profiles import load_profile

#: Items in the order they are to be recorded in; each is the file of its name.
ITEMS = ("probe", "knee", "kernels", "pairs", "multiplex", "resize")

__all__ = ["ITEMS", "Record", "Target", "perform", "status"]


def perform(
    item: str,
    out: Path,
    device: str = "gpu",
    quick: bool = False,
    minutes: float = 9.0,
    resume: Path | None = None,
    keep: bool = False,
) -> Record:
    """Do what is left of an item, as far as the time goes.

    Parameters
    ----------
    item : str
        One of `ITEMS`.
    out : Path
        Gets ``ITEM/DEVICE.json`` and ``ITEM/DEVICE-TABLE.csv``; what is there is gone on with.
    device : {"gpu", "mps", "green", "cpu"}
        ``gpu``: NVIDIA MPS and green contexts.
    quick : bool
        Small grids, to try the whole path.
    minutes : float
        After this the call ends, 10 at most with what ending takes.
    resume : Path, optional
        Another folder to go on from, if `out` is empty.
    keep : bool
        Of the knee: copy the first mechanism's profile to ``data/profiles/DEVICE.csv``, where `load_profile` finds it.

    Raises
    ------
    ValueError
        If there is no such item or device, or `out` is of another machine.
    RuntimeError
        If the machine has no GPU.
    """
    begin_s = time.monotonic()
    require(item in ITEMS, "agenda", item, f"one of {', '.join(ITEMS)}, or status")
    require(not keep or (item == "knee" and not quick), "keep", keep, "False, except for the knee without quick")
    target = Target(device, quick)
    record = Record(item, out, target.name, target.provenance(), minutes, resume, begin_s)
    record.say(f"on {record.provenance}; {record.left_s:.0f} s")
    with target:
        if target.on_gpu and item not in ("probe", "kernels"):  # which look at each thing by itself
            target, lacking = target.usable()
            record.refuse(lacking)
        importlib.import_module(f"{__name__}.{item}").run(target, record)
    record.say(record.summary())
    if keep:
        keep_profile(record, target.mechanisms[0], data_folder() / "profiles")
    return record


def keep_profile(record: Record, mechanism: str, folder: Path) -> Path:
    """Copy the knee's profile to ``FOLDER/DEVICE.csv``.

    Raises
    ------
    RuntimeError
        If the knee is not complete: half a grid must not pass for the whole.
    """
    names = record.names("left") + record.names("failed")
    if names or not record.steps:
        raise RuntimeError(f"not kept: {len(names)} steps of the knee are left or failed ({', '.join(names[:4])}); call again")
    path = load_profile(record.table_path(mechanism)).save(folder / f"{record.device}.csv")
    record.say(f"kept as {path.name}: lab.load_profile({record.device!r}); for all defaults set profiles.DEFAULT_PROFILE to it")
    return path


def status(out: Path) -> str:
    """Say which items are recorded under `out`, on which device, when, and what failed."""
    return ticks.status(out, ITEMS)

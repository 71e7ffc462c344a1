"""What one item of the agenda has found so far: steps with their outcome, tables, and how much time is left.

Kept on the disk after every step, so that a crash, the end of the time or Ctrl-C loses one step at most,
and another call goes on where this one stopped.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dstack_lab.checks import positive, require
from dstack_lab.files import whole_file
from dstack_lab.provenance import Provenance, today

#: A step that failed in this many calls is not tried again.
MOST_TRIES = 2
#: Size of an archive at most [MiB].
MOST_MIB = 12
#: What makes records of two calls comparable.
SAME = ("device", "torch", "driver")


class OutOfTime(BaseException):
    """The time of this call is over; not an `Exception`, so that no step can take it for one of its own."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to measure.

    Parameters
    ----------
    name : str
    work : callable
        Measures and returns what JSON can hold; may call `Record.add`.
    needs_s : float
        It is begun only if this much time is left [s].
    """

    name: str
    work: Callable[[], Any]
    needs_s: float = 15.0


class Record:
    """The files of one item on one device: ``OUT/ITEM/DEVICE.json`` and ``OUT/ITEM/DEVICE-TABLE.csv``.

    Parameters
    ----------
    item : str
    out : Path
    device : str
        Short name for files, such as ``"h200"``.
    provenance : Provenance
    minutes : float
        Time of this call.
    resume : Path, optional
        Another OUT, whose files are taken over first.
    begin_s : float, optional
        When this call began, on ``time.monotonic``.

    Raises
    ------
    ValueError
        If the files in `out` are of another device or torch.
    """

    def __init__(
        self,
        item: str,
        out: Path,
        device: str,
        provenance: Provenance,
        minutes: float = 9.0,
        resume: Path | None = None,
        begin_s: float | None = None,
    ) -> None:
        self.item, self.device, self.provenance, self.resume = item, device, provenance, resume
        self.folder = Path(out) / item
        self.begin_s = time.monotonic() if begin_s is None else begin_s
        self.end_s = self.begin_s + 60 * positive("minutes", minutes)
        self.path = self.folder / f"{device}.json"
        self.steps: dict[str, dict[str, Any]] = {}
        self.calls: list[dict[str, Any]] = []
        if resume is not None and not self.path.exists():
            self._take_over(Path(resume) / item)
        if self.path.exists():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            before, now = _same(Provenance.from_dict(old["provenance"])), _same(provenance)
            require(before == now, f"record {self.path.name}", before, f"of {now}, as this machine: choose another --out")
            self.steps, self.calls = old["steps"], old["calls"]
        self.calls.append({"date": today(), "minutes": minutes})

    def _take_over(self, folder: Path) -> None:
        """Copy the files of an earlier call, unless they are of another machine."""
        try:
            old = Provenance.from_dict(json.loads((folder / self.path.name).read_text(encoding="utf-8"))["provenance"])
        except FileNotFoundError:
            return
        if _same(old) != _same(self.provenance):
            self.say(f"not resumed: {folder / self.path.name} is of {_same(old)}, this machine is {_same(self.provenance)}")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob(f"{self.device}[.-]*")):
            shutil.copyfile(file, self.folder / file.name)
        self.say(f"resumed from {folder}")

    @property
    def left_s(self) -> float:
        """Seconds that this call may still use."""
        return self.end_s - time.monotonic()

    def say(self, text: str) -> None:
        """Print progress with the seconds gone."""
        print(f"[{time.monotonic() - self.begin_s:5.0f} s] {self.item}: {text}", flush=True)

    def run(self, steps: list[Step]) -> None:
        """Do what is left of `steps`: fresh ones first, then those that failed in an earlier call."""
        for step in steps:
            self.steps.setdefault(step.name, {"state": "left", "tries": 0})
        fresh = [s for s in steps if self.steps[s.name]["state"] == "left"]
        again = [s for s in steps if self.steps[s.name]["state"] == "failed" and self.steps[s.name]["tries"] < MOST_TRIES]
        self.save()
        try:
            for step in fresh + again:
                if self.left_s >= step.needs_s:
                    self._do(step)
        finally:
            self.calls[-1]["seconds"] = round(time.monotonic() - self.begin_s, 1)
            self.save()

    def refuse(self, lacking: Mapping[str, str]) -> None:
        """Book what cannot be measured here at all, and why: mechanism -> sentence."""
        self.steps = {name: entry for name, entry in self.steps.items() if not entry.get("refused")}  # perhaps it can be had now
        for name, why in lacking.items():
            self.steps[name] = {"state": "failed", "tries": MOST_TRIES, "error": why, "refused": True}
            self.say(f"without {name}: {why}")

    def _do(self, step: Step) -> None:
        entry, begin = self.steps[step.name], time.monotonic()
        self.say(f"{step.name} ...")
        try:
            with _alarm(self.left_s):
                value = step.work()
            entry |= {"state": "done", "value": value}
            entry.pop("error", None)
        except OutOfTime:
            entry |= {"state": "left", "error": "the time of the call ended within it"}
        except Exception as error:  # one failure must not lose the rest
            entry |= {"state": "failed", "error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
        entry["tries"] += entry["state"] == "failed"
        entry["seconds"] = round(time.monotonic() - begin, 2)
        self.say(f"{step.name}: {entry['state']} in {entry['seconds']:g} s{'; ' + entry['error'] if 'error' in entry else ''}")
        self.save()

    def add(self, table: str, rows: pd.DataFrame, step: str) -> None:
        """Write rows into a table, in place of those that an earlier try of the step wrote."""
        old = self.table(table)
        if old is not None:
            rows = pd.concat([old[old["step"] != step], rows.assign(step=step)], ignore_index=True)
        else:
            rows = rows.assign(step=step)
        with whole_file(self.table_path(table)) as path:
            rows.to_csv(path, index=False, lineterminator="\n")

    def pack(self, archive: str, name: str, content: bytes) -> bool:
        """Put a file into ``DEVICE-ARCHIVE.zip``, in place of one of that name; an item leaves few files that way.

        Returns
        -------
        bool
            False if the archive would pass `MOST_MIB`: it is left as it was, and that is said.
        """
        path = self.folder / f"{self.device}-{archive}.zip"
        kept: dict[str, bytes] = {}
        if path.exists():
            with zipfile.ZipFile(path) as old:
                kept = {known: old.read(known) for known in old.namelist()}
        kept[name] = content
        if sum(map(len, kept.values())) > MOST_MIB * 2**20:
            self.say(f"{name} is not kept: {path.name} would pass {MOST_MIB} MiB")
            return False
        with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as new:  # what is packed is compressed already
            for known in sorted(kept):
                new.writestr(zipfile.ZipInfo(known), kept[known])
        return True

    def table_path(self, table: str) -> Path:
        """File of a table."""
        return self.folder / f"{self.device}-{table}.csv"

    def table(self, table: str) -> pd.DataFrame | None:
        """Return a table as it is now; None if nothing was written yet."""
        path = self.table_path(table)
        return pd.read_csv(path, comment="#", keep_default_na=True) if path.exists() else None

    def value(self, step: str) -> Any:
        """What a step found; None if it is not done."""
        return self.steps.get(step, {}).get("value")

    def names(self, state: str) -> list[str]:
        """Steps that are ``"done"``, ``"failed"`` or ``"left"``."""
        return [name for name, entry in self.steps.items() if entry["state"] == state]

    def save(self) -> None:
        """Write the JSON file."""
        left = [name for name, e in self.steps.items() if e["state"] == "left" or (_failed(e) and e["tries"] < MOST_TRIES)]
        record = {
            "item": self.item,
            "provenance": self.provenance.to_dict(),
            "complete": bool(self.steps) and not left,
            "left": left,
            "failed": self.names("failed"),
            "calls": self.calls,
            "steps": self.steps,
        }
        with whole_file(self.path) as path:
            path.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """One sentence: what is done, failed and left."""
        done, failed, left = self.names("done"), self.names("failed"), self.names("left")
        text = f"{len(done)} of {len(self.steps)} steps done"
        text += f", {len(failed)} failed ({', '.join(failed[:4])}{' ...' if len(failed) > 4 else ''})" if failed else ""
        text += f", {len(left)} left ({', '.join(left[:4])}{' ...' if len(left) > 4 else ''}): call again" if left else ""
        return text


def _failed(entry: dict[str, Any]) -> bool:
    return bool(entry["state"] == "failed")


def _same(provenance: Provenance) -> tuple[str, str, str]:
    versions = provenance.versions
    return provenance.device, versions.get("torch", ""), versions.get("driver", "")


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `seconds`; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

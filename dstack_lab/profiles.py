"""Profiles: service time by network, batch and GPU%, and where the numbers come from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dstack_lab.checks import require
from dstack_lab.files import data_folder, whole_file
from dstack_lab.provenance import Provenance

COLUMNS = ("model", "batch", "gpu_pct", "service_ms")
HEADER = "# dstack_lab profile "

#: A row may be this much faster than one with a larger share or a smaller batch
#: before a strict profile refuses it: room for rounding, not for noise.
MONOTONE_TOLERANCE = 0.02

#: What the golden path and the panels begin with: a name under ``data/profiles``.
DEFAULT_PROFILE = "v100-simulated"


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Service time of one batch, by model, batch and GPU%.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``model`` (text), ``batch`` (integer, 1 or more), ``gpu_pct`` (1 to 100) and
        ``service_ms`` (finite, above 0); further columns are kept. One row per point.
    provenance : Provenance
        Origin of the numbers.
    strict : bool
        A strict profile is a full grid per model and monotone: never slower with more GPU%,
        never faster with a larger batch, within 2 %. Measured or budgeted points rarely are:
        ``strict=False`` keeps them, and `lab.fit` smooths them.

    Raises
    ------
    ValueError
        Naming the column, the value and the allowed range.
    """

    table: pd.DataFrame
    provenance: Provenance
    strict: bool = True

    def __post_init__(self) -> None:
        require(isinstance(self.provenance, Provenance), "provenance", self.provenance, "a Provenance")
        object.__setattr__(self, "table", _clean(self.table))
        if self.strict:
            for model in self.models:
                _require_grid(model, self.of(model))

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the networks in the profile, in alphabetical order."""
        return tuple(sorted(self.table["model"].unique()))

    def of(self, model: str) -> pd.DataFrame:
        """Rows of one network.

        Raises
        ------
        ValueError
            If the profile does not hold `model`.
        """
        require(model in self.models, "model", model, f"one of {', '.join(self.models)}")
        return self.table[self.table["model"] == model].reset_index(drop=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a CSV whose first line is the provenance; the file is whole or absent."""
        record = {**self.provenance.to_dict(), "strict": self.strict}
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
            out.write(HEADER + json.dumps(record, sort_keys=True) + "\n")
            self.table.to_csv(out, index=False, lineterminator="\n")
        return Path(path)


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Load a recorded profile.

    Parameters
    ----------
    name_or_path : str or path
        A name under ``data/profiles``, such as ``"v100-simulated"``, or the path of a CSV file that `Profile.save` wrote.

    Raises
    ------
    ValueError
        If no such profile exists, or the file is damaged.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = data_folder() / "profiles" / f"{path.name}.csv"
    if not path.is_file():
        known = sorted(p.stem for p in (data_folder() / "profiles").glob("*.csv"))
        raise ValueError(f"profile = {str(name_or_path)!r}: must be an existing CSV file or one of {', '.join(known)}")
    with open(path, encoding="utf-8", errors="replace") as source:
        first = source.readline()
        require(first.startswith(HEADER), f"first line of {path.name}", first[:60], f"'{HEADER}{{...}}'")
        try:
            record = json.loads(first[len(HEADER) :])
            table = pd.read_csv(source)
        except ValueError as error:  # JSON and CSV parsers both raise kinds of it
            raise ValueError(f"profile {path.name}: must be a readable CSV with a JSON first line ({error})") from error
    require(isinstance(record, dict), f"first line of {path.name}", record, "a JSON object")
    strict = bool(record.pop("strict", True))
    return Profile(table, Provenance.from_dict(record), strict)


def _clean(table: pd.DataFrame) -> pd.DataFrame:
    """Check every cell and return the rows in canonical order and types."""
    require(isinstance(table, pd.DataFrame), "table", type(table).__name__, "a pandas DataFrame")
    missing = [c for c in COLUMNS if c not in table.columns]
    require(not missing, "table columns", list(table.columns), f"at least {list(COLUMNS)}")
    require(len(table) > 0, "table rows", 0, "1 or more")
    table = table.copy()
    for column in COLUMNS[1:]:
        number = pd.to_numeric(table[column], errors="coerce")
        bad = table.loc[~np.isfinite(number), column]
        require(bad.empty, column, None if bad.empty else bad.iloc[0], "a finite number in every row")
        table[column] = number
    _require_all(table, table["model"].map(lambda m: isinstance(m, str) and bool(m)), "model", "a non-empty text")
    _require_all(table, (table["batch"] >= 1) & (table["batch"] % 1 == 0), "batch", "an integer, 1 or more")
    _require_all(table, table["gpu_pct"].between(1, 100), "gpu_pct", "from 1 to 100")
    _require_all(table, table["service_ms"] > 0, "service_ms", "above 0")
    table = table.astype({"batch": np.int64, "gpu_pct": np.float64, "service_ms": np.float64})
    double = table[table.duplicated(list(COLUMNS[:3]), keep=False)]
    require(double.empty, "(model, batch, gpu_pct)", None if double.empty else tuple(double.iloc[0, :3]), "listed once")
    return table.sort_values(list(COLUMNS[:3]), ignore_index=True)


def _require_all(table: pd.DataFrame, good: pd.Series, column: str, allowed: str) -> None:
    good = good.astype(bool)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        require(False, f"{column} in row {row}", table[column].iloc[row], allowed)


def _require_grid(model: str, rows: pd.DataFrame) -> None:
    """Refuse holes and rows that run against physics."""
    grid = rows.pivot(index="batch", columns="gpu_pct", values="service_ms")
    cure = "pass strict=False to keep scattered or noisy points"
    if grid.isna().to_numpy().any():
        i, j = np.argwhere(grid.isna().to_numpy())[0]
        raise ValueError(
            f"profile of {model}: no row for batch {grid.index[i]} at GPU% {grid.columns[j]:g}: "
            f"every batch needs every share; {cure}"
        )
    ms = grid.to_numpy()
    for axis, sign, what in ((1, 1, "slower with more GPU%"), (0, -1, "faster with a larger batch")):
        step = sign * np.diff(np.log(ms), axis=axis)
        if (step > MONOTONE_TOLERANCE).any():
            i, j = np.argwhere(step > MONOTONE_TOLERANCE)[0]
            at = (i, j + 1) if axis == 1 else (i + 1, j)
            raise ValueError(
                f"profile of {model}: service_ms = {ms[at]:g} at batch {grid.index[at[0]]}, GPU% {grid.columns[at[1]]:g}: "
                f"must not be {what} (neighbour: {ms[i, j]:g}); {cure}"
            )

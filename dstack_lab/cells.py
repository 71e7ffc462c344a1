"""Cells of an experiment: computed once each, on one or several processes, kept in a folder by content.

A cell is a call of a function; its result is rows of plain values. With a folder, each finished cell
is a small file named by the digest of all that the result depends on: an interrupted experiment goes
on where it stopped, and a changed one computes only what changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from dstack_lab.checks import require
from dstack_lab.digests import digest, sources
from dstack_lab.files import whole_file
from dstack_lab.progress import progress_bar

FORMAT = "dstack_lab cell 1"

Row = dict[str, Any]
Work = Callable[..., Iterable[Row]]


def run_cells(
    work: Work,
    calls: Sequence[tuple[Any, ...]],
    folder: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: bool = False,
    text: str = "Cells",
) -> list[list[Row]]:
    """Return the rows of ``work(*call)`` for each call, in order.

    Parameters
    ----------
    work : callable
        Returns mappings of column to number, text, truth value or None.
    calls : sequence of tuple
    folder : path, optional
        Where finished cells are kept; a damaged file is computed again.
    jobs : int
        Processes; -1 for one per core.
    progress : bool
        Show a progress bar.
    text : str
        Its label.

    Raises
    ------
    ValueError
        If `jobs` is not 1 or more, or -1, or `work` returns something that no table can hold.
    """
    whole = isinstance(jobs, int) and not isinstance(jobs, bool)
    require(whole and (jobs >= 1 or jobs == -1), "jobs", jobs, "an integer, 1 or more, or -1 for all cores")
    paths: list[Path | None] = [None] * len(calls)
    if folder is not None:
        paths = [Path(folder) / f"{digest(FORMAT, sources(), work, call)}.json" for call in calls]
    found = {i: rows for i, path in enumerate(paths) if path is not None and (rows := _load(path)) is not None}
    first = {path: i for i, path in reversed([*enumerate(paths)]) if path is not None}  # equal cells are computed once
    todo = [i for i, path in enumerate(paths) if i not in found and first.get(path, i) == i]  # type: ignore[arg-type]
    with progress_bar(progress and bool(todo), len(todo), text, "cell") as bar:
        for i, rows in _computed(work, calls, paths, todo, jobs):
            found[i] = rows
            bar.update(1)
    return [found[i if i in found else first[path]] for i, path in enumerate(paths)]  # type: ignore[index]


def _computed(work: Work, calls: Sequence[Any], paths: Sequence[Path | None], todo: Sequence[int], jobs: int) -> Iterable[Any]:
    if jobs == 1 or len(todo) < 2:
        return (_compute(i, work, calls[i], paths[i]) for i in todo)
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
    return parallel(delayed(_compute)(i, work, calls[i], paths[i]) for i in todo)  # type: ignore[no-any-return]


def _compute(number: int, work: Work, call: tuple[Any, ...], path: Path | None) -> tuple[int, list[Row]]:
    """Run one cell and keep it, in whatever process; what is kept survives an interrupt."""
    rows = [{str(name): _plain(str(name), value) for name, value in row.items()} for row in work(*call)]
    if path is not None:
        body = json.dumps(rows)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "check": _check(body), "rows": body}), encoding="utf-8")
    return number, rows


def _load(path: Path) -> list[Row] | None:
    """Return the rows of a finished cell; None if there is none, or its file is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT and record["check"] == _check(record["rows"]):
            return list(json.loads(record["rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _check(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _plain(column: str, value: object) -> Any:
    """Return what a file can keep without loss, so that a kept result equals a fresh one."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    require(isinstance(value, Real), f"result {column}", value, "a number, a text or None")
    return float(value)  # type: ignore[arg-type]

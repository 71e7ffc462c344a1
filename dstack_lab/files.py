"""Files that are either whole or absent: write to a temporary name, then rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` only if the block succeeds.

    A reader therefore never sees half a file: not after Ctrl-C, not on a full disk.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    try:
        yield Path(name)
        Path(name).chmod(0o644)  # mkstemp makes private files; results are meant to be read
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def data_folder() -> Path:
    """Folder of recorded profiles and traces: inside an installed package, or of the checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "data"

"""Files that are either whole or absent: write to a temporary name, then rename."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` only if the block succeeds.

    A reader therefore never sees half a file: not after Ctrl-C, not on a full disk.

    Raises
    ------
    OSError
        If the file cannot be written; names `path`, not the temporary one.
    """
    target = Path(path)
    name = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        yield Path(name)
        Path(name).chmod(0o644)  # mkstemp makes private files; results are meant to be read
        Path(name).replace(target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write ({error.strerror or error}); choose another place", str(target)) from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Make the folder of `path` and try to write there: a long measurement must not fail when it is saved.

    Raises
    ------
    OSError
        As `whole_file`.
    """
    target = Path(path)
    with contextlib.suppress(_Tried), whole_file(target) as draft:
        draft.write_bytes(bytes(4096))  # an empty file can be made on a full disk too
        raise _Tried


class _Tried(Exception):
    """Leaves `whole_file` without a file."""


def data_folder() -> Path:
    """Folder of recorded profiles and traces: inside an installed package, or of the checkout."""
    inside = Path(__file__).parent / "data"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "data"

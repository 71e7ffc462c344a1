"""A progress bar, where one is wanted and tqdm is installed; a bare GPU server may lack it."""

from __future__ import annotations

from typing import Any


def progress_bar(show: bool, total: float, text: str, unit: str) -> Any:
    """Return a progress bar, or something that takes its calls."""
    if not show:
        return _NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, desc=text, unit=unit, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:g}/{total_fmt} {unit}")


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def update(self, amount: float = 1) -> None:
        """Nothing to show."""

    def set_description_str(self, text: str) -> None:
        """Nothing to show."""

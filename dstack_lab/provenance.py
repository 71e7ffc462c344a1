"""Where a number comes from: every profile and trace carries one of these."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dstack_lab.checks import require

KINDS = ("measured", "simulated")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a profile or trace.

    Parameters
    ----------
    kind : {"measured", "simulated"}
        Whether a clock was read on real hardware, or a model was evaluated.
    device : str
        What ran, or what was modelled: ``"V100-like, 80 SMs"``, ``"AMD EPYC, 2 cores"``.
    mechanism : str
        How a share was made real: ``"core sets"``, ``"MPS"``, ``"green contexts"``, ``"model"``.
    versions : dict of str to str
        Programs that shaped the number.
    date : str
        ISO date of the recording.
    marks : tuple of str
        Reservations a reader must see: oversubscribed machine, core quota, too few repeats.
    """

    kind: str
    device: str
    mechanism: str
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "provenance.kind", self.kind, f"one of {KINDS}")
        for name in ("device", "mechanism"):
            require(bool(getattr(self, name)), f"provenance.{name}", getattr(self, name), "a non-empty text")
        object.__setattr__(self, "marks", tuple(self.marks))

    def __str__(self) -> str:
        text = f"{self.kind}, {self.device}, {self.mechanism}"
        if self.date:
            text += f", {self.date}"
        return text + "".join(f" [{mark}]" for mark in self.marks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that JSON can hold."""
        return {**asdict(self), "marks": list(self.marks)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Provenance:
        """Build from `to_dict`'s result.

        Raises
        ------
        ValueError
            If a key is missing or unknown.
        """
        known = {f.name for f in fields(cls)}
        require(
            isinstance(record, dict) and set(record) <= known, "provenance", record, f"a mapping with keys from {sorted(known)}"
        )
        for name in ("kind", "device", "mechanism"):
            require(name in record, f"provenance.{name}", None, "present")
        return cls(**record)


def versions_here(*packages: str) -> dict[str, str]:
    """Versions of Python and of the named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """ISO date of now, for `Provenance.date`."""
    return datetime.date.today().isoformat()

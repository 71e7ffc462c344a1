"""Several GPUs: how many, and the profile of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dstack_lab.checks import count, require
from dstack_lab.profiles import DEFAULT_PROFILE, Profile, load_profile

Kind = str | Profile


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs that serve together; constructing one reads no file.

    Parameters
    ----------
    gpus : int, sequence of str or Profile, or mapping of name to str or Profile
        How many equal GPUs; or the profile of each, by the name or path that `load_profile` takes or
        as a `Profile`; or the same with a name of one's own for each GPU.
    profile : str or Profile
        That of equal GPUs, where `gpus` is a number.

    Attributes
    ----------
    gpus : tuple of str or Profile
        One per GPU.
    names : tuple of str
        ``gpu0``, ``gpu1``, ... unless `gpus` is a mapping.

    Examples
    --------
    ``Cluster(gpus=4)``; ``Cluster(gpus=("v100-simulated", "v100-simulated", "h200-simulated"))``;
    ``Cluster(gpus={"old": "v100-simulated", "new": measured})``.
    """

    gpus: int | Iterable[Kind] | Mapping[str, Kind] = 1
    profile: Kind = DEFAULT_PROFILE
    names: tuple[str, ...] = field(init=False)
    _read: dict[str, Profile] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        given = self.gpus
        names: tuple[object, ...] | None = None
        if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
            found: tuple[object, ...] = (self.profile,) * count("gpus", given)
        elif isinstance(given, Mapping):
            names, found = tuple(given), tuple(given.values())
        else:
            several = isinstance(given, Iterable) and not isinstance(given, str)
            require(several, "gpus", given, "a number of GPUs, 1 or more, or a profile for each")
            found = tuple(given)  # type: ignore[arg-type]  # checked in words above
        require(len(found) > 0, "gpus", given, "1 or more")
        for kind in found:
            good = isinstance(kind, Profile) or (isinstance(kind, str) and bool(kind))
            require(good, "profile", kind, "a Profile, or the name or path of one")
        names = tuple(f"gpu{i}" for i in range(len(found))) if names is None else names
        for name in names:
            require(isinstance(name, str) and bool(name), "name of a GPU", name, "a non-empty text")
        object.__setattr__(self, "gpus", found)
        object.__setattr__(self, "names", names)

    def __repr__(self) -> str:
        kinds = (kind if isinstance(kind, str) else kind.provenance.device for kind in self.gpus)  # type: ignore[union-attr]
        return f"Cluster({', '.join(f'{name}: {kind}' for name, kind in zip(self.names, kinds, strict=True))})"

    def __len__(self) -> int:
        return len(self.names)

    def profiles(self) -> tuple[Profile, ...]:
        """Profile of each GPU; equal GPUs share one object. Files are read at the first call.

        Raises
        ------
        ValueError
            If there is no profile of a name.
        """
        found = []
        for kind in self.gpus:  # type: ignore[union-attr]  # a tuple since `__post_init__`
            if isinstance(kind, str):
                if kind not in self._read:
                    self._read[kind] = load_profile(kind)
                found.append(self._read[kind])
            else:
                found.append(kind)
        return tuple(found)

    def kinds(self) -> tuple[tuple[Profile, ...], tuple[int, ...]]:
        """Return the different profiles, and for each GPU which of them it has."""
        each = self.profiles()
        different = tuple({id(p): p for p in each}.values())
        place = {id(p): i for i, p in enumerate(different)}
        return different, tuple(place[id(p)] for p in each)

    @property
    def device(self) -> str:
        """What the GPUs are, in words: ``"2 x V100-like, 80 SMs + 1 x H200-like, 132 SMs"``."""
        kinds, which = self.kinds()
        return " + ".join(f"{which.count(i)} x {kind.provenance.device}" for i, kind in enumerate(kinds))

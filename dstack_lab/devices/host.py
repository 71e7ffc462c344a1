"""Facts about this machine's cores, read from ``/proc`` and ``/sys`` under a root that tests can move."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def usable_cores() -> tuple[int, ...]:
    """Logical CPUs this process may run on; unlike ``os.cpu_count()``, which is the machine's."""
    return tuple(sorted(os.sched_getaffinity(0)))


def core_groups(cores: tuple[int, ...], root: Path = Path("/")) -> tuple[tuple[int, ...], ...]:
    """Group logical CPUs by the physical core they share; a CPU without a record stands alone."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for core in cores:
        text = _read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings = _cpu_list(text) if text else (core,)
        groups.setdefault(siblings, []).append(core)
    return tuple(sorted(tuple(sorted(group)) for group in groups.values()))


def quota_cores(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that control groups allow: the least on the way up; None if unlimited.

    A quota throttles in time: it lets all threads run, then stops all of them.
    """
    found = [limit for folder in _cgroup_folders(root) if (limit := _quota(folder)) is not None]
    return min(found) if found else None


def pressure_pct(root: Path = Path("/")) -> float | None:
    """Share of the last 10 s [%] in which some process waited for a core; None if not told."""
    for line in (_read(root / "proc/pressure/cpu") or "").splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs)
        if kind == "some" and "avg10" in values:
            return float(values["avg10"])
    return None


def load_per_core(root: Path = Path("/")) -> float | None:
    """Load of the last minute: processes that ran or waited, per core of the machine; None if not told."""
    text = _read(root / "proc/loadavg")
    online = _read(root / "sys/devices/system/cpu/online")
    if not text or not online:
        return None
    return float(text.split()[0]) / len(_cpu_list(online))


def steal_pct(root: Path = Path("/")) -> float | None:
    """Share of busy time since boot [%] that the hypervisor gave to others; None if not told."""
    first = (_read(root / "proc/stat") or "").split("\n", 1)[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    busy = user + nice + system + irq + softirq + steal
    return 100 * steal / busy if busy else 0.0


def cpu_name(root: Path = Path("/")) -> str:
    """Name of the processor."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine() or "CPU"


def _cgroup_folders(root: Path) -> list[Path]:
    """Folders of this process's cpu control groups, from its own up to the top, version 1 and 2."""
    top = root / "sys/fs/cgroup"
    folders = [top, top / "cpu", top / "cpu,cpuacct"]  # in a container the paths told may be the host's
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        bases = [top] if controllers == "" else [top / controllers, top / "cpu"] if "cpu" in controllers.split(",") else []
        for base in bases:
            own = base / path.strip().lstrip("/")
            while own != base and base in own.parents:
                folders.append(own)
                own = own.parent
    return list(dict.fromkeys(folders))


def _quota(folder: Path) -> float | None:
    text = _read(folder / "cpu.max")
    if text is None:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        text = f"{quota} {period}" if quota and period else ""
    parts = text.split()
    if len(parts) != 2 or parts[0] == "max" or int(parts[0]) <= 0:
        return None
    return int(parts[0]) / int(parts[1])


def _cpu_list(text: str) -> tuple[int, ...]:
    """Read the kernel's notation: ``"0-3,8"``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None

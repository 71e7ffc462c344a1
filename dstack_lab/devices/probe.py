"""What this machine can do, and why not: looks, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

#: Smallest group of SMs of a green context, and what larger ones are a multiple of, by major
#: compute capability (CUDA programming guide, green contexts).
GREEN_SMS = {6: (1, 1), 7: (2, 2), 8: (4, 2), 9: (8, 8)}

#: CUDA version of the first driver with green contexts.
GREEN_CUDA = (12, 4)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Parameters
    ----------
    what : str
        Such as ``"MPS programs"``.
    ok : bool or None
        Whether it is as it should be; None if it is only worth knowing, or could not be told.
    found : str
        What is there.
    cure : str
        What to do about it; empty if nothing.
    """

    what: str
    ok: bool | None
    found: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found, from the driver down to the cores. Print it, or see `to_frame`.

    Parameters
    ----------
    findings : tuple of Finding
    """

    findings: tuple[Finding, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of this package that can be used here: ``"cpu"``, ``"mps"``, ``"green"``."""
        return tuple(name for name in ("cpu", "mps", "green") if self[f"device {name}"].ok)

    def __getitem__(self, what: str) -> Finding:
        """Return the first finding about `what`.

        Raises
        ------
        KeyError
            If nothing of that name was looked at.
        """
        for finding in self.findings:
            if finding.what == what:
                return finding
        raise KeyError(what)

    def to_frame(self) -> pd.DataFrame:
        """One row per finding: ``what``, ``ok`` (True, False, or None for "worth knowing"), ``found``, ``cure``."""
        import pandas as pd

        columns = ("what", "ok", "found", "cure")
        return pd.DataFrame([[getattr(f, c) for c in columns] for f in self.findings], columns=list(columns)).astype(
            {"ok": object}
        )

    def __str__(self) -> str:
        width = max(len(f.what) for f in self.findings)
        sign = {True: "yes", False: "NO ", None: "   "}
        lines = []
        for f in self.findings:
            text = f.found + (f"; cure: {f.cure}" if f.cure else "")
            head = f"{sign[f.ok]}  {f.what:{width}}  "
            lines += textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
        return "\n".join(lines)


def probe(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Probe:
    """Look at driver, GPUs, MPS, green contexts, torch and cores.

    Every step stands alone: one that fails is a finding. No setting is changed, no daemon started,
    no CUDA context created.

    Parameters
    ----------
    environ : mapping, optional
        In place of this process's environment.
    root : Path
        In place of the root of the files.

    Examples
    --------
    >>> import dstack_lab as lab
    >>> "cpu" in [row.removeprefix("device ") for row in lab.devices.probe().to_frame()["what"]]
    True
    """
    steps: tuple[tuple[str, Callable[[Mapping[str, str], Path], list[Finding]]], ...] = (
        ("driver", _driver),
        ("GPU", _gpus),
        ("MPS programs", _mps_programs),
        ("foreign MPS daemon", _foreign),
        ("cuda-bindings", _bindings),
        ("torch", _torch),
        ("cores", _cores),
    )
    findings: list[Finding] = []
    for what, step in steps:
        if what != "GPU" or findings[0].ok:  # without a driver there is nothing more to say
            findings += _try(what, step, environ, root)
    return Probe((*findings, *_verdicts(findings)))


def _try(
    what: str, step: Callable[[Mapping[str, str], Path], list[Finding]], environ: Mapping[str, str], root: Path
) -> list[Finding]:
    from dstack_lab.devices.nvml import NoDriver

    try:
        return step(environ, root)
    except NoDriver as error:
        found, _, cure = str(error).partition(": ")
        return [Finding(what, False, found, cure)]
    except Exception as error:  # what cannot be looked at must not hide the rest
        return [Finding(what, None, f"could not be looked at: {type(error).__name__}: {error}")]


def _driver(environ: Mapping[str, str], root: Path) -> list[Finding]:
    from dstack_lab.devices import nvml

    driver, cuda = nvml.versions()
    text = "of unknown CUDA" if cuda is None else f"CUDA {cuda[0]}.{cuda[1]}"
    findings = [Finding("driver", True, f"{driver or 'NVIDIA driver'}, {text}")]
    if cuda is not None:
        cure = "" if cuda >= GREEN_CUDA else "install a driver of CUDA 12.4 (550) or later"
        findings.append(Finding("driver for green contexts", cuda >= GREEN_CUDA, f"CUDA {cuda[0]}.{cuda[1]}, 12.4 needed", cure))
    return findings


def _gpus(environ: Mapping[str, str], root: Path) -> list[Finding]:
    from dstack_lab.devices import nvml

    found = nvml.gpus(environ)
    if not found:
        hidden = "CUDA_VISIBLE_DEVICES" in environ
        cure = "unset CUDA_VISIBLE_DEVICES" if hidden else "start the container with --gpus all"
        return [Finding("GPU", False, "the driver shows none to this process", cure)]
    findings = []
    for gpu in found:
        at = "" if len(found) == 1 else f" {gpu.index}"
        sms = "SMs unknown" if gpu.sms is None else f"{gpu.sms} SMs"
        memory = "" if gpu.memory_mib is None else f", {gpu.memory_mib / 1024:.0f} GiB"
        findings.append(Finding(f"GPU{at}", True, f"{gpu.name}, {sms}{memory}"))
        mode = gpu.compute_mode or "unknown"
        exclusive = mode == "exclusive process"
        usable = mode in ("default", "unknown") or (exclusive and not gpu.processes)
        cure = "" if usable else f"as root: nvidia-smi -i {gpu.index} -c DEFAULT"
        note = (": a process has it" if gpu.processes else ": only MPS, or one process") if exclusive else ""
        findings.append(Finding(f"compute mode{at}", usable, mode + note, cure))
        cure = f"as root: nvidia-smi -i {gpu.index} -mig 0" if gpu.mig else ""
        findings.append(Finding(f"MIG{at}", not gpu.mig, {True: "on", False: "off", None: "not supported"}[gpu.mig], cure))
        text = {True: "SM activity can be sampled", False: "not on this GPU", None: "unknown"}[gpu.gpm]
        findings.append(Finding(f"GPM{at}", gpu.gpm or None, text + ("" if gpu.gpm else "; utilization is computed instead")))
        if gpu.capability is not None:
            least, step = GREEN_SMS[max(k for k in GREEN_SMS if k <= max(6, gpu.capability[0]))]
            text = f"groups of {least} SMs or more, in multiples of {step} (as documented; the driver is asked at the start)"
            findings.append(Finding(f"green context size{at}", None, text))
        if gpu.processes:
            text = f"{len(gpu.processes)} compute on it now: {', '.join(map(str, gpu.processes))}"
            findings.append(Finding(f"processes{at}", None, text, "end them before measuring"))
    return findings


def _mps_programs(environ: Mapping[str, str], root: Path) -> list[Finding]:
    from dstack_lab.devices import mps_daemon as mps

    control = mps.find_program(mps.CONTROL, environ)
    if control is None:
        cure = "install nvidia-compute-utils of the driver's version, or start the container with the 'compute' driver capability"
        return [Finding("MPS programs", False, f"no {mps.CONTROL} on PATH or in {', '.join(mps.PLACES)}", cure)]
    path = os.pathsep.join([str(Path(control).parent), environ.get("PATH", "")])
    if mps.find_program(mps.SERVER, {"PATH": path}) is None:
        return [Finding("MPS programs", False, f"{control}, but no {mps.SERVER}", "install both from the same driver package")]
    number = mps.version(control)
    clients = 60 if (number or 0) >= mps.SIXTY_CLIENTS else 48
    return [Finding("MPS programs", True, f"{control}, version {number or 'unknown'}: up to {clients} workers on a GPU")]


def _foreign(environ: Mapping[str, str], root: Path) -> list[Finding]:
    from dstack_lab.devices import mps_daemon as mps

    folder = root / str(mps.FOREIGN).lstrip("/")
    own = environ.get("CUDA_MPS_PIPE_DIRECTORY")
    findings = []
    if mps.foreign_daemon(folder):
        cure = (
            "for programs that should not use it set CUDA_MPS_PIPE_DIRECTORY to an empty private folder; workers of Mps() do so"
        )
        findings.append(
            Finding("foreign MPS daemon", None, f"one listens in {mps.FOREIGN}: every CUDA program here joins it", cure)
        )
    if own:
        findings.append(Finding("MPS in the environment", None, f"CUDA_MPS_PIPE_DIRECTORY={own}: plain CUDA programs go there"))
    return findings or [Finding("foreign MPS daemon", True, "none")]


def _bindings(environ: Mapping[str, str], root: Path) -> list[Finding]:
    try:
        there = importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # not even a package "cuda"
        there = False
    if not there:
        return [Finding("cuda-bindings", False, "not installed", "pip install 'cuda-bindings>=13.0.3,<14'")]
    return [Finding("cuda-bindings", True, _version("cuda-bindings"))]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _torch(environ: Mapping[str, str], root: Path) -> list[Finding]:
    """Read the file that says it: importing torch costs seconds, and asking it could start CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return [Finding("torch", False, "not installed", "pip install torch")]
    told: dict[str, str | None] = {}
    for line in (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        name = name.partition(":")[0].strip()
        if name in ("__version__", "cuda"):
            told[name] = None if value.strip() == "None" else value.strip().strip("'\"")
    if told.get("cuda") is None:
        cure = "install a CUDA build, see https://pytorch.org/get-started/locally"
        return [Finding("torch with CUDA", False, f"torch {told.get('__version__')} was built without CUDA", cure)]
    return [Finding("torch with CUDA", True, f"torch {told.get('__version__')} for CUDA {told['cuda']}")]


def _cores(environ: Mapping[str, str], root: Path) -> list[Finding]:
    from dstack_lab.devices import host
    from dstack_lab.devices.cpu import Cpu

    logical, groups = host.usable_cores(), Cpu().slots(root)
    findings = [Finding("cores", len(groups) > 1, f"{host.cpu_name(root)}, {len(groups)} cores ({len(logical)} logical CPUs)")]
    cures = {
        "core quota": "ask for whole cores (cpuset) in place of a quota",
        "oversubscribed": "stop other work, or wait, before measuring",
        "stolen time": "measure on a machine of one's own",
        "one core": "use a machine with 2 cores or more",
    }
    for mark in Cpu().marks(root):
        kind, _, sentence = mark.partition(": ")
        findings.append(Finding(kind, None if kind == "hyperthreads" else False, sentence, cures.get(kind, "")))
    return findings


def _verdicts(findings: list[Finding]) -> list[Finding]:
    """Which devices can be used: those that nothing they need speaks against."""
    gpu = ("driver", "GPU", "compute mode", "MIG", "torch", "torch with CUDA")
    needs = {
        "cpu": ("cores",),
        "mps": (*gpu, "MPS programs"),
        "green": (*gpu, "driver for green contexts", "cuda-bindings"),
    }
    first: dict[str, Finding] = {}  # of several GPUs
    for finding in findings:
        first.setdefault(finding.what.rstrip(" 0123456789"), finding)
    out = []
    for name, what in needs.items():
        lacking = [need for need in what if need in first and not first[need].ok]
        text = f"lacks {', '.join(lacking)}" if lacking else f"lab.devices.{name.capitalize()}() can be used"
        out.append(Finding(f"device {name}", not lacking, text, "see above" if lacking else ""))
    return out

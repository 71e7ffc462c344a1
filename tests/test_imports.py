"""Rooms and floors: imports point strictly downward, and what is imported stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dstack_lab

PACKAGE = Path(dstack_lab.__file__).parent

#: Floor -> rooms (a file or a folder of the package). A half floor holds helpers of the floor above it.
FLOORS: dict[float, str] = {
    -1: "checks digests files progress protocol",
    -0.5: "cells points provenance work",
    0: "arrivals profiles traces variability",
    0.5: "bert brackets monotone operations tables vision",
    0.7: "contention fusion",
    1: "gpu_specs kernels knees services zoo",
    1.5: "chrome_trace constraints kernel_cost kriging state surface trace_tables",
    2: "gpu_model kernel_model metrics",
    2.5: "bounds",
    3: "active ledger optimizer policies workloads",
    3.5: "admission compiled recipes turns",
    4: "devices simulator",
    4.4: "starter",
    4.5: "cuda_backend fleet helper retries trials",
    5: "capacity ceilings cluster experiments session validation worker",
    5.5: "ablation helper_process",
    6: "profiler runner",
    6.5: "agenda peers",
    7: "figures",
    8: "exercises panels",
    9: "__init__",
    9.5: "demo gallery",  # uses the public names, as a reader would
    10: "cli",
    11: "__main__",
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}

#: What a bare GPU server need not have.
ABSENT = ("IPython", "anywidget", "ipywidgets", "jupyterlab", "matplotlib", "plotly", "tqdm")


def room_of(path: Path) -> str:
    """Room of a file: its own name, or the folder it lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {room_of(path) for path in FILES}


def imported_rooms(tree: ast.AST, path: Path) -> set[str]:
    """Rooms that a file imports, inside functions too. The package's public names count as its top floor."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the folder of the file, or one above it for each further dot
                folder = path.relative_to(PACKAGE.parent).parts[: -node.level]
                base = ".".join([*folder, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dstack_lab":
                found.add(parts[1] if parts[1:] and parts[1] in ROOMS else "__init__")
    return found


def climbs(source: str, path: Path) -> list[str]:
    """Sentences about the imports of one file that do not point strictly downward."""
    room = room_of(path)
    found = imported_rooms(ast.parse(source), path) - {room}
    return [
        f"{room} (floor {FLOOR_OF[room]}) imports {other} (floor {FLOOR_OF[other]})"
        for other in sorted(found & FLOOR_OF.keys())
        if FLOOR_OF[other] >= FLOOR_OF[room]
    ]


def test_every_room_has_a_floor():
    missing = sorted(ROOMS - FLOOR_OF.keys())
    assert not missing, f"add {', '.join(missing)} to FLOORS in tests/test_imports.py, above all that it imports"


def test_no_room_has_two_floors():
    rooms = [room for rooms in FLOORS.values() for room in rooms.split()]
    assert len(rooms) == len(set(rooms))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    if room_of(path) in FLOOR_OF:
        assert climbs(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("source", "climb"),
    [
        ("import dstack_lab.worker", "simulator (floor 4) imports worker (floor 5)"),
        ("from dstack_lab import devices", "simulator (floor 4) imports devices (floor 4)"),
        ("def f():\n    from dstack_lab.runner import run", "simulator (floor 4) imports runner (floor 6)"),
        ("from .profiler import measure", "simulator (floor 4) imports profiler (floor 6)"),
        ("from . import worker", "simulator (floor 4) imports worker (floor 5)"),
        ("import dstack_lab as lab", "simulator (floor 4) imports __init__ (floor 9)"),
        ("from dstack_lab import Plan", "simulator (floor 4) imports __init__ (floor 9)"),
    ],
)
def test_the_rule_bites(source, climb):
    assert climbs(source, PACKAGE / "simulator.py") == [climb]


def test_the_rule_lets_pass():
    assert climbs("from dstack_lab.policies.base import Policy\nimport numpy", PACKAGE / "simulator.py") == []
    assert climbs("from . import base\nfrom ..state import Wake", PACKAGE / "policies" / "temporal.py") == []


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light():
    loaded = fresh_python("import sys, dstack_lab; dir(dstack_lab); print(*sys.modules)").split()
    assert {"torch", "torchvision", "scipy", *ABSENT}.isdisjoint(loaded)


def test_figures_and_panels_bring_nothing_slow_along():
    code = "import sys, dstack_lab as lab; lab.panels.KneeExplorer; print(*sys.modules); import rfc3987_syntax"
    loaded = fresh_python(code).split()
    assert {"torch", "torchvision", "matplotlib", "numba", "scipy.stats", "rfc3987_syntax"}.isdisjoint(loaded)
    assert {"plotly", "ipywidgets", "scipy.optimize"} <= set(loaded)


def test_measuring_path_needs_no_notebook_packages():
    """Every room that a GPU server uses imports where figures, notebooks and progress bars are not installed."""
    assert fresh_python(f"""
import importlib, pkgutil, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for room in "worker profiler runner devices policies active simulator optimizer metrics agenda peers".split():
    module = importlib.import_module(f"dstack_lab.{{room}}")
    for inner in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"dstack_lab.{{room}}.{{inner.name}}")
import torch
print("ok")
""").endswith("ok\n")


@pytest.mark.parametrize("name", dstack_lab.__all__)
def test_public_name_resolves(name):
    assert getattr(dstack_lab, name) is not None


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = dstack_lab.no_such_thing

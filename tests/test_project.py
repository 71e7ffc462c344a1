"""The files around the package agree with each other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dstack_lab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
CONDA_NAMES = {"playwright": "playwright-python", "torch": "pytorch"}


def parsed(*lists: list[str]) -> dict[str, Requirement]:
    """Requirements by name; the package's own extras (`dstack-lab[test]`) are opened."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, chain.from_iterable(lists)):
        if requirement.name == PROJECT["name"]:
            found |= parsed(*(EXTRAS[extra] for extra in requirement.extras))
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def make_targets() -> dict[str, str]:
    """Targets of the Makefile that explain themselves, and what they say."""
    return dict(re.findall(r"^([a-z-]+):.*## (.+)$", MAKEFILE, re.MULTILINE))


def test_conda_environment_says_the_same_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = parsed([line for line in environment if isinstance(line, str) and line != "pip"])
    assert str(conda.pop("python").specifier) == PROJECT["requires-python"]
    wanted = parsed(PROJECT["dependencies"], EXTRAS["dev"])
    assert {name: r.specifier for name, r in conda.items()} == {
        CONDA_NAMES.get(name, name): r.specifier for name, r in wanted.items()
    }
    assert {"pip": ["-e ."]} in environment


def test_constraints_are_plain_pins():
    """No host, path, local version such as +cpu, or range: the file must mean the same on every machine."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9]+(\.[0-9A-Za-z]+)*", line), line
    assert (pins()["torch"], pins()["torchvision"]) == ("2.13.0", "0.28.0")


def test_constraints_satisfy_pyproject():
    """Except extra `gpu`: there the driver of the machine decides."""
    for name, requirement in parsed(PROJECT["dependencies"], EXTRAS["dev"], EXTRAS["bench"]).items():
        assert name in pins(), f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins()[name]), f"{name}=={pins()[name]} is outside {requirement}"


def brought_along(requirement: Requirement, found: set[str]) -> set[str]:
    """Names of all packages that installing a requirement installs too, as far as they are here."""
    name = canonicalize_name(requirement.name)
    new = {f"{name}[{extra}]" for extra in requirement.extras or {""}} - found
    found |= new
    for extra in {e.partition("[")[2].rstrip("]") for e in new}:
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            return found
        for inner in map(Requirement, asked):
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                brought_along(inner, found)
    return found


def test_constraints_name_all_that_is_installed():
    """Else a package's package is new every day. A CUDA build of torch brings NVIDIA's own, in the versions it needs."""
    found = brought_along(Requirement(f"{PROJECT['name']}[dev,bench]"), set())
    names = {name.partition("[")[0] for name in found} - {canonicalize_name(PROJECT["name"])}
    theirs = {name for name in names if name.startswith(("nvidia-", "cuda-toolkit")) or name == "triton"} - pins().keys()
    assert len(names) > 100
    assert names - theirs <= pins().keys()


@pytest.mark.parametrize("names", [PROJECT["dependencies"], *EXTRAS.values()], ids=["dependencies", *EXTRAS])
def test_dependencies_are_in_alphabetical_order(names):
    names = [name for name in names if not name.startswith(PROJECT["name"])]
    assert names == sorted(names)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dstack_lab.__version__ == PROJECT["version"] == citation["version"] == newest[1]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


@pytest.mark.parametrize("script", re.findall(r"\$\(PY\) (\S+\.py)", MAKEFILE))
def test_scripts_that_make_runs_exist(script):
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("module", re.findall(r"\$\(PY\) -m (dstack_lab\.\S+)", MAKEFILE))
def test_modules_that_make_runs_exist(module):
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("verb", re.findall(r"\$\(PY\) -m dstack_lab ([a-z]+)", MAKEFILE))
def test_verbs_that_make_runs_exist(verb):
    shown = subprocess.run([sys.executable, "-m", "dstack_lab", verb, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert verb in shown.stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_make_commands_in_the_texts_exist(page):
    text = (ROOT / page).read_text()
    code = text if page == ".ci/run" else "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    asked = set(re.findall(r"(?:^|[`\s])make ([a-z][a-z-]*)", code))
    assert asked <= make_targets().keys()


def test_ci_runs_the_command_of_the_readme():
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"^make test\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run is not executable"
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would, also where these tests were started by `make test`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "-C", folder, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_bare_make_lists_every_target():
    shown = make(ROOT, "--no-print-directory").stdout
    assert shown.splitlines() == [f"make {target:16} {text}" for target, text in make_targets().items()]
    assert {"demo", "test", "lab"} <= make_targets().keys()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        ("no-such-python", "There is no no-such-python here"),
        ("./old-python", "needs Python 3.11 or newer and ./old-python is 3.9"),
    ],
)
def test_make_explains_an_unusable_python(tmp_path, monkeypatch, python, sentence):
    monkeypatch.setenv("OLD", sys.executable)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"  # runs what it is given as if it were 3.9
    old.write_text('#!/bin/sh\nexec "$OLD" -c "import sys; sys.version_info = (3, 9); exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    made = make(tmp_path, "test", f"PYTHON={python}")
    assert made.returncode != 0
    assert sentence in made.stdout + made.stderr
    assert not (tmp_path / ".venv").exists()

"""README tells the truth: its golden path is run, and what it shows as output is what comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

import dstack_lab as lab

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The first fenced block of `language` that holds `containing`."""
    for found in re.findall(rf"```{language}\n(.*?)```", README, flags=re.S):
        if containing in found:
            return found
    raise AssertionError(f"README has no {language} block with {containing!r}")


def test_the_golden_path_prints_what_readme_shows():
    code = block("python", "lab.optimize(services, profile)")
    names: dict = {}
    exec(code, names)
    with pd.option_context("display.width", 120, "display.max_columns", 20):
        table = lab.summary(names["trace"]).round(3).to_string(index=False)
    assert table.strip() == block("text", "slo_attainment").strip()
    assert names["trace"].provenance.kind == "simulated"


def test_the_golden_path_is_the_notebooks():
    """README and notebook 00 ask for the same services, plan and run."""
    text = (ROOT / "notebooks/00_tour.ipynb").read_text(encoding="utf-8").replace('\\"', '"')
    code = block("python", "lab.optimize(services, profile)")
    for line in code.splitlines():
        if "lab.Service(" in line or "lab.simulate(" in line or "lab.optimize(" in line:
            assert line.split("#")[0].strip().rstrip(",") in text


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))) or ["missing"])
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()

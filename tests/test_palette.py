"""Who has which colour: the same in every figure, no two alike while one is free, told apart without one kind of cone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab import figures, policies
from dstack_lab.figures import style
from dstack_lab.figures.palette import COLORS, NETWORKS, POLICIES, places
from dstack_lab.policies import Policy

FEW = len(COLORS)
NAMES = st.lists(st.sampled_from([*NETWORKS, "a", "b", "c", "d"]) | st.text(max_size=3), unique=True, max_size=20)


@pytest.mark.parametrize("group", [NETWORKS, POLICIES], ids=["networks", "policies"])
@given(st.data())
def test_the_first_seven_have_one_look_in_every_figure(group, data):
    shown = data.draw(st.lists(st.sampled_from([*group, "mine", "yours"]), unique=True, max_size=14))
    whole = style.cues(group)
    assert {name: cue for name, cue in style.cues(shown).items() if name in group[:FEW]} == {
        name: whole[name] for name in shown if name in group[:FEW]
    }


@given(NAMES)
def test_no_two_share_a_colour_while_one_is_free(names):
    found = style.cues(iter(names))
    assert list(found) == names
    assert len({cue.color for cue in found.values()}) == min(len(names), FEW)
    assert len(set(places(names).values())) == len(names)


def test_the_standard_networks_and_all_policies_are_known():
    profile = lab.load_profile("v100-simulated")
    assert [service.name for service in lab.workload("C-7", profile)] == list(NETWORKS)
    assert len(NETWORKS) == FEW
    kinds = {name for name in policies.__all__ if isinstance(kind := getattr(policies, name), type) and issubclass(kind, Policy)}
    assert set(POLICIES) == kinds - {"Policy"}


def test_two_figures_of_a_network_agree():
    profile = lab.load_profile("v100-simulated")
    pair = [figures.knee(profile, names) for names in (["alexnet", "resnet50"], ["resnet50", "vgg19", "alexnet"])]
    looks = [{t.name: (t.line.color, t.line.dash) for t in made.data if t.name.endswith("fitted")} for made in pair]
    assert looks[0].items() <= looks[1].items()


# --- colours, computed


def linear(color: str) -> np.ndarray:
    """Linear red, green and blue of ``#rrggbb`` in sRGB."""
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


#: Linear RGB as seen without one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "all cones": np.eye(3),
    "no L": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no M": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no S": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab_of(color: str, eye: str) -> np.ndarray:
    """CIELAB of a colour as an eye sees it."""
    t = XYZ @ np.clip(np.asarray(EYES[eye]) @ linear(color), 0, 1) / XYZ.sum(axis=1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(pairs: list[tuple[str, str]]) -> float:
    """Least distance of any pair to any eye."""
    return min(float(np.linalg.norm(lab_of(a, eye) - lab_of(b, eye))) for a, b in pairs for eye in EYES)


def test_the_colour_beside_okabe_and_ito_s_is_further_from_them_than_they_are_from_each_other():
    *okabe_ito, wine = COLORS
    assert apart([(wine, one) for one in okabe_ito]) > apart(list(combinations(okabe_ito, 2)))


@pytest.mark.parametrize("color", COLORS)
def test_a_colour_is_seen_on_light_and_on_dark(color):
    bright, page = XYZ[1] @ linear(color), XYZ[1] @ linear("#111111")
    assert min(1.05 / (bright + 0.05), (bright + 0.05) / (page + 0.05)) > 2.2

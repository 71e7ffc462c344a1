from __future__ import annotations

import pytest
from builders import profile

import dstack_lab as lab
from dstack_lab.ablation import WHOLE, variants

PROFILE = profile(light=(1.0, 0.2, 30), heavy=(4.0, 2.0, 70))


@pytest.fixture(scope="module")
def table():
    services = [lab.Service("light", 40, lab.Poisson(3000)), lab.Service("heavy", 80, lab.Poisson(480))]
    return lab.ablate(services, PROFILE, loads=(0.4, 0.75), seeds=(0, 1, 2), duration_ms=3000)


def test_every_variant_is_compared_with_the_whole_on_the_same_requests(table):
    whole = table[table["policy"] == WHOLE]
    assert set(variants()) <= set(table["policy"])
    assert (whole["slo_attainment_gain"] == 0).all()
    counts = table[table["service"] == "all"].groupby("load")["requests"].nunique()
    assert (counts == 1).all()


def test_an_ingredient_that_serves_requests_is_missed_when_it_is_gone(table):
    """Planned windows alone leave the gaps between them empty: that must cost requests under load."""
    rows = table[(table["service"] == "all") & (table["load"] == 0.75)].set_index("policy")
    assert rows.loc["no opportunistic launches", "slo_attainment_gain_high"] < 0
    gain = rows.loc["no opportunistic launches", "slo_attainment"] - rows.loc[WHOLE, "slo_attainment"]
    assert rows.loc["no opportunistic launches", "slo_attainment_gain"] == pytest.approx(gain)

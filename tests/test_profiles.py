from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED, profile

import dstack_lab as lab

HEAD = '# dstack_lab profile {"kind": "%s", "device": "d", "mechanism": "m"}\n'
GOOD = profile(net=(1.0, 0.5, 40))


def test_save_and_load_keep_rows_and_provenance(tmp_path):
    path = GOOD.save(tmp_path / "p.csv")
    loaded = lab.load_profile(path)
    pd.testing.assert_frame_equal(loaded.table, GOOD.table)
    assert loaded.provenance == GOOD.provenance


def test_the_shipped_profiles_load_and_say_they_are_simulated():
    for name in ("v100", "t4", "a100", "h100", "h200"):
        shipped = lab.load_profile(f"{name}-simulated")
        assert shipped.strict
        assert shipped.provenance.kind == "simulated"
        assert {"resnet50", "vgg19", "mobilenet_v2", "alexnet"} <= set(shipped.models)


def change(column, value):
    table = GOOD.table.copy()
    table[column] = table[column].astype(object)
    table.loc[3, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (GOOD.table.iloc[:0], "table rows = 0"),
        (GOOD.table.drop(columns="service_ms"), "table columns"),
        (GOOD.table.to_dict(), "table = 'dict'"),
        (change("batch", 0), "batch in row 3 = 0"),
        (change("batch", 1.5), r"batch in row 3 = 1\.5"),
        (change("gpu_pct", 0), "gpu_pct in row 3 = 0"),
        (change("gpu_pct", 101), "gpu_pct in row 3 = 101"),
        (change("service_ms", 0), "service_ms in row 3 = 0"),
        (change("service_ms", -2), "service_ms in row 3 = -2"),
        (change("service_ms", np.nan), "service_ms = nan"),
        (change("service_ms", "fast"), "service_ms = 'fast'"),
        (change("model", ""), "model in row 3 = ''"),
        (GOOD.table.drop(index=3), "no row for batch 1 at GPU% 40: every batch needs every share"),
        (change("service_ms", 99.0), "must not be slower with more GPU%"),
        (pd.concat([GOOD.table, GOOD.table.iloc[[2]]]), r"\(model, batch, gpu_pct\)"),
        (
            GOOD.table.assign(service_ms=GOOD.table["service_ms"] / GOOD.table["batch"] ** 2),
            "must not be faster with a larger batch",
        ),
    ],
)
def test_bad_tables_are_refused_by_field_value_and_range(table, message):
    with pytest.raises(ValueError, match=message):
        lab.Profile(table, SIMULATED)


def test_holes_and_noise_are_kept_when_asked_and_when_saved(tmp_path):
    noisy = change("service_ms", 99.0).drop(index=7).astype({"service_ms": float})
    kept = lab.Profile(noisy, SIMULATED, strict=False)
    assert len(lab.load_profile(kept.save(tmp_path / "noisy.csv")).table) == len(noisy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,batch,gpu_pct,service_ms\na,1,50,2\n", "first line"),
        ("# dstack_lab profile {not json}\nmodel\n", "must be a readable CSV"),
        ("# dstack_lab profile []\nmodel\n", "JSON object"),
        ('# dstack_lab profile {"kind": "measured"}\nmodel,batch,gpu_pct,service_ms\na,1,50,2\n', r"provenance\.device"),
        (HEAD % "guessed" + "model,batch,gpu_pct,service_ms\na,1,50,2\n", "kind = 'guessed'"),
        (HEAD % "measured", "must be a readable CSV"),
        (HEAD % "measured" + "a,b\n1,2\n", "table columns"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, text, message):
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        lab.load_profile(file)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"profile = 'v200': must be .*v100-simulated"):
        lab.load_profile("v200")
    with pytest.raises(ValueError, match="model = 'gpt': must be one of net"):
        GOOD.of("gpt")


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        GOOD.save(tmp_path / "p.csv")
    assert list(tmp_path.iterdir()) == []


def test_service_and_plan_arguments_are_checked():
    with pytest.raises(ValueError, match="slo_ms = 0"):
        lab.Service("a", 0, lab.Poisson(1))
    with pytest.raises(ValueError, match="arrivals = 100"):
        lab.Service("a", 10, 100)
    with pytest.raises(ValueError, match="model = ''"):
        lab.Service("", 10, lab.Poisson(1))
    with pytest.raises(ValueError, match="gpu_pct = 0"):
        lab.Allocation("a", 0, 1, 1.0, 1.0)
    with pytest.raises(ValueError, match="batch = 0"):
        lab.Allocation("a", 10, 0, 1.0, 1.0)
    plan = lab.optimize([lab.Service("net", 50, lab.Poisson(10), name="one")], GOOD)
    assert plan["one"].batch >= 1
    with pytest.raises(ValueError, match="service = 'two'"):
        plan["two"]
    with pytest.raises(ValueError, match="a batch of 1 to 16"):
        plan.tables[0].at(17, 50)

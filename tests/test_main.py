"""The command line: what it prints and saves, and one sentence for each thing that can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import builders
import pandas as pd
import pytest

import dstack_lab as lab
from dstack_lab.__main__ import main
from dstack_lab.demo import demo
from dstack_lab.files import require_writable, whole_file

RUN = ["run", "small:25:200", "large:50:100", "--simulate", "--seconds", "1", "--seed", "3"]


@pytest.fixture
def profile(tmp_path):
    """A profile on disk."""
    return builders.profile(small=(1.0, 0.5, 40.0), large=(2.0, 1.0, 80.0)).save(tmp_path / "toy.csv")


def test_a_simulated_run_is_the_library_s(profile, tmp_path, capsys):
    assert main([*RUN, "--profile", str(profile), "--out", str(tmp_path / "a folder" / "trace.npz")]) == 0
    services = [lab.Service("small", 25, lab.Poisson(200)), lab.Service("large", 50, lab.Poisson(100))]
    wanted = lab.simulate(lab.optimize(services, lab.load_profile(profile)), lab.DStack(), 1000, seed=3)
    found = lab.load_trace(tmp_path / "a folder" / "trace.npz").requests
    pd.testing.assert_frame_equal(found, wanted.requests, check_dtype=False, check_categorical=False, check_exact=True)
    said = capsys.readouterr().out
    assert lab.summary(wanted).round(3).to_string(index=False) in said
    assert "simulated" in said
    assert "measured" not in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["small:25"], "service = 'small:25': must be model:slo_ms:rate_rps, such as resnet18:200:5"),
        (["small:-25:200"], "slo_ms = -25.0: must be a finite number above 0"),
        (["tiny:25:200"], "model of tiny = 'tiny': must be one of large, small"),
        (["small:1:5000"], "small asks for slo_ms = 1 at 5000/s, but"),
        (["small:25:200", "--seed", "-1"], "seed = -1: must be an integer, 0 or more"),
    ],
)
def test_a_bad_run_ends_in_one_sentence(profile, tmp_path, capsys, more, sentence):
    assert main(["run", *more, "--simulate", "--profile", str(profile), "--out", str(tmp_path / "trace.npz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dstack_lab run: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "trace.npz").exists()


@pytest.mark.parametrize("words", [["demo", "--seconds", "-1"], ["run", "--seconds", "x"], ["measure", "--minutes", "0"]])
def test_a_length_is_above_zero(capsys, words):
    with pytest.raises(SystemExit):
        main(words)
    assert f"{words[-2]}: '{words[-1]}': must be a finite number above 0" in capsys.readouterr().err


def test_what_cannot_be_saved_is_not_begun(profile, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "sub" / "trace.npz"
    for name in ("simulate", "measure", "run"):
        monkeypatch.setattr(lab, name, lambda *_, **__: pytest.fail("began"), raising=False)
    assert main([*RUN, "--profile", str(profile), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"dstack_lab run: {out}: cannot write (Not a directory); choose another place\n"
    assert main(["measure", "alexnet", "--out", str(out)]) == 2
    assert f"{out}: cannot write (Not a directory)" in capsys.readouterr().err
    with pytest.raises(OSError, match="cannot write"):
        demo(tmp_path / "file", 1000)


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"cannot write \(No space left on device\).*a\.csv"):
        require_writable(tmp_path / "a.csv")
    assert list(tmp_path.iterdir()) == []


def test_trying_leaves_nothing_and_harms_nothing(tmp_path):
    (tmp_path / "old.csv").write_text("kept")
    require_writable(tmp_path / "old.csv")
    require_writable(tmp_path / "new.csv")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old.csv": "kept"}
    with whole_file(tmp_path / "new.csv") as draft:
        draft.write_text("x")
    assert (tmp_path / "new.csv").read_text() == "x"


def test_ctrl_c_is_one_sentence(tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "measure", stopped, raising=False)
    assert main(["measure", "alexnet", "--out", str(tmp_path / "x.csv")]) == 130
    assert capsys.readouterr().err == "dstack_lab measure: stopped\n"


@pytest.mark.slow
def test_ctrl_c_while_importing_is_one_sentence_too(tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")  # what a signal does in the first half second
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-m", "dstack_lab", "probe"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "dstack_lab: stopped\n")

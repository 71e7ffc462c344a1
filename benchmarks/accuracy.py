"""How wrong the GPU% model is: one row per task, with its target.

    python benchmarks/accuracy.py [--data FOLDER] [--profile FILE ...] [--out FILE]

The public tables are for calibration and checks only and are not part of the project; without them
those rows are left out. Any profile is judged by leaving its points out in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy_kernels import results

from dstack_lab.active import choose_points
from dstack_lab.files import whole_file
from dstack_lab.gpu_model import fit
from dstack_lab.profiles import Profile, load_profile
from dstack_lab.provenance import Provenance

ROOT = Path(__file__).parents[1]
NETWORKS = ("alexnet_trt", "mobilenet_trt", "resnet50_trt", "vgg19_trt", "alexnet_cntk", "resnet50_cntk", "vgg19_cntk")
LEFT_OUT_SETS = ("alexnet_low", "gnmt_b11")  # another engine build; an ambiguous log
GRID = np.arange(10.0, 101.0, 10.0)
BUDGET = 12
Row = tuple[str, str, str, float, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the public tables")
    parser.add_argument("--profile", type=Path, action="append", default=[], help="a profile to judge too (repeatable)")
    parser.add_argument("--out", type=Path, help="CSV file to save the table to")
    asked = parser.parse_args()
    rows: list[Row] = []
    if asked.data.is_dir():
        rows += public_rows(asked.data)
        rows += bottom_up_rows(asked.data)
    else:
        print(f"The public tables are not at {asked.data}: their rows are left out.")
    for path in asked.profile:
        try:
            rows += profile_rows(load_profile(path), path.stem)
        except ValueError as error:
            parser.error(str(error))
    if not rows:
        return
    table = pd.DataFrame(rows, columns=["task", "network", "target", "value_pct", "met"])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.1f}"))
    if asked.out:
        with whole_file(asked.out) as temporary:
            table.to_csv(temporary, index=False, float_format="%.2f")
        print(f"Saved {asked.out}")


def bottom_up_rows(data: Path) -> Iterator[Row]:
    """The rows of accuracy_kernels.py: the model that needs no measurement of the network."""
    for found in results(data).itertuples():
        target = "" if pd.isna(found.reach) else f"{'>=' if found.reach > 0.5 else '<='} {100 * found.reach:.0f} %"
        met = ("yes" if found.reached else "NO") if target else ""
        yield f"bottom-up: {found.figure.strip()}", "", target, 100 * float(found.value), met


def public_rows(data: Path) -> Iterator[Row]:
    """Rows against the authors' logs and the igniter tables."""
    gslice, igniter = authors_logs(data / "v100_gslice_authors.csv"), igniter_solo(data / "v100_igniter_solo.csv")
    for name in gslice.models:
        yield row("fit on all points, in-sample median", name, 3, 100 * fit(gslice, name).error)
    near: list[bool] = []
    inside: list[bool] = []
    for profile, target, source in ((gslice, 6, "authors"), (igniter, 5, "igniter")):
        pooled: list[float] = []
        for name in profile.models:
            errors, hits, held = from_few(profile, name)
            pooled += errors
            near += hits
            inside += held
            label = f"{name} ({source})"
            yield row(f"{BUDGET} points predict the rest, median", label, target, 100 * float(np.median(errors)))
            yield row(f"{BUDGET} points predict the rest, 90th percentile", label, 15, 100 * float(np.quantile(errors, 0.9)))
        yield row(f"{BUDGET} points predict the rest, median", f"all ({source})", target, 100 * float(np.median(pooled)))
        yield row(
            f"{BUDGET} points predict the rest, 90th percentile", f"all ({source})", 15, 100 * float(np.quantile(pooled, 0.9))
        )
    yield row(f"knee from {BUDGET} points within one grid step", "all", 95, 100 * float(np.mean(near)), at_least=True)
    yield row("90 % knee interval holds the knee of all points", "all", 90, 100 * float(np.mean(inside)), at_least=True)


def from_few(profile: Profile, name: str) -> tuple[list[float], list[bool], list[bool]]:
    """Errors on points not measured; per batch, whether the knee is near that of all points, and in its interval."""
    rows = profile.of(name)
    known = dict(zip(zip(rows["batch"], rows["gpu_pct"], strict=True), rows["service_ms"], strict=True))
    batches = sorted(rows["batch"].unique().tolist())
    whole = rows.groupby("gpu_pct").size() == len(batches)  # shares at which every batch was measured
    choice = choose_points(lambda b, g: known[b, g], batches, whole[whole].index.tolist(), BUDGET)
    asked = set(zip(choice.table["batch"], choice.table["gpu_pct"], strict=True))
    errors = [abs(float(choice.model.predict(*at)) / ms - 1) for at, ms in known.items() if at not in asked]
    full = fit(profile, name)
    pairs = [(choice.model.knee(b, shares=GRID), full.knee_pct(b, shares=GRID)) for b in batches]
    return errors, [abs(few.pct - pct) < 10.5 for few, pct in pairs], [few.low <= pct <= few.high for few, pct in pairs]


def profile_rows(profile: Profile, source: str) -> Iterator[Row]:
    """Error of every network of a profile at points left out in turn."""
    for name in profile.models:
        if len(profile.of(name)) >= 3:
            yield row("points left out in turn, median", f"{name} ({source})", 6, 100 * fit(profile, name).held_out_error)


def row(task: str, network: str, target: float, value_pct: float, at_least: bool = False) -> Row:
    met = value_pct >= target if at_least else value_pct <= target
    return (task, network, f"{'>=' if at_least else '<='} {target:g} %", value_pct, "yes" if met else "no")


def authors_logs(path: Path) -> Profile:
    """Read the authors' logs; a point in several sets counts once, as their median."""
    logs = pd.read_csv(path)
    logs = logs[logs["model"].isin(NETWORKS) & ~logs["set"].isin(LEFT_OUT_SETS)]
    logs = logs.rename(columns={"median_latency_ms": "service_ms"})
    return _measured(logs.groupby(["model", "batch", "gpu_pct"])["service_ms"].median().reset_index())


def igniter_solo(path: Path) -> Profile:
    return _measured(pd.read_csv(path)[["model", "batch", "gpu_pct", "service_ms"]])


def _measured(points: pd.DataFrame) -> Profile:
    return Profile(points, Provenance("measured", "V100, 80 SMs", "MPS"), strict=False)


if __name__ == "__main__":
    main()

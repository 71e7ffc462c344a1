"""How wrong is the GPU% model that only reads a network's kernels? Checked on public V100 measurements.

    python benchmarks/accuracy_kernels.py [--data FOLDER] [--out FILE.csv]

The measurements are described in the data folder's README; they are used for checks and for the
V100's constants, which are the same for every network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dstack_lab import zoo
from dstack_lab.bert import Bert
from dstack_lab.files import whole_file
from dstack_lab.gpu_specs import V100
from dstack_lab.kernel_model import KernelModel
from dstack_lab.kernels import Kernels, of_module

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LEFT_OUT = ("alexnet_low", "gnmt_b11")  # another engine build; ambiguous
NETWORKS = {"alexnet": "alexnet", "mobilenet": "mobilenet_v2", "resnet50": "resnet50", "vgg19": "vgg19"}
ORION = ("resnet50", "mobilenetv2", "bert")


def kernels_of(name: str, fused: bool = True) -> Kernels:
    if name == "bert":  # what Orion ran: BERT-large on 384 tokens
        with torch.device("meta"):
            return of_module(Bert(24, 1024, 16).eval(), torch.empty(1, 384, dtype=torch.int64, device="meta"), name, fused)
    network = zoo.load({"mobilenetv2": "mobilenet_v2"}.get(name, name), device="meta")
    return of_module(network.module, network.example, name, fused)


def predictions(data: Path) -> pd.DataFrame:
    """Measured and predicted time of every point that has a measurement at 100 % beside it."""
    rows = pd.read_csv(data / "v100_gslice_authors.csv")
    rows = rows[~rows["set"].isin(LEFT_OUT)]
    rows[["name", "runtime"]] = rows["model"].str.rsplit("_", n=1, expand=True)
    rows = rows[rows["name"].isin(NETWORKS) & rows["runtime"].isin(("trt", "cntk"))].copy()
    models = {name: KernelModel(kernels_of(own), V100, graphs=False) for name, own in NETWORKS.items()}
    rows["predicted_ms"] = np.nan
    for name, group in rows.groupby("name"):
        rows.loc[group.index, "predicted_ms"] = models[name].predict(group["batch"], group["gpu_pct"])
    rows = rows.rename(columns={"median_latency_ms": "measured_ms"})
    whole = rows[rows["gpu_pct"] == 100].set_index(["set", "model", "batch"])[["measured_ms", "predicted_ms"]]
    return rows.join(whole.add_suffix("_at_100"), on=["set", "model", "batch"]).dropna(subset=["measured_ms_at_100"])


def absolute_error(rows: pd.DataFrame) -> pd.Series:
    return (rows["predicted_ms"] / rows["measured_ms"] - 1).abs()


def shape_error(rows: pd.DataFrame) -> pd.Series:
    """Error of the latency relative to that at 100 %, at every other share."""
    rows = rows[rows["gpu_pct"] < 100]
    told = rows["predicted_ms"] / rows["predicted_ms_at_100"]
    seen = rows["measured_ms"] / rows["measured_ms_at_100"]
    return (told / seen - 1).abs()


def knees(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured and predicted knee: smallest share on the 10 % grid within 5 % of the time at 100 %."""
    rows = rows[rows["gpu_pct"] % 10 == 0].sort_values("gpu_pct")
    found = []
    for key, group in rows.groupby(["set", "model", "batch"]):
        knee = {
            c: group.loc[group[f"{c}_ms"] <= 1.05 * group[f"{c}_ms_at_100"], "gpu_pct"].min() for c in ("measured", "predicted")
        }
        found.append({"model": key[1], "batch": key[2], **knee})
    return pd.DataFrame(found)


def narrow_share(data: Path, name: str) -> tuple[float, float]:
    """Part of the time that goes to kernels needing fewer SMs than the V100 has: measured, predicted."""
    rows = pd.read_csv(data / "v100_orion_kernels.csv")
    rows = rows[rows["model"] == name]
    kernels, batch = kernels_of(name, fused=False), int(rows["batch"].iloc[0])  # Orion ran eager PyTorch
    spent = KernelModel(kernels, V100).kernel_ms(batch, 100)[:, 0]
    narrow = (kernels.at(batch)["sms"] < V100.sms).to_numpy()
    seen = rows["duration_us"]
    return float(seen[rows["sm_needed"] < V100.sms].sum() / seen.sum()), float(spent[narrow].sum() / spent.sum())


def solo_errors(data: Path) -> tuple[float, float]:
    """Shape (relative to 80 %) and absolute error on iGniter's batches of powers of two: a newer library."""
    rows = pd.read_csv(data / "v100_igniter_solo.csv")
    rows = rows[rows["model"].isin(("alexnet", "resnet50", "vgg19")) & rows["batch"].isin((1, 2, 4, 8, 16, 32))].copy()
    for name, group in rows.groupby("model"):
        rows.loc[group.index, "predicted_ms"] = KernelModel(kernels_of(name), V100, graphs=False).predict(
            group["batch"], group["gpu_pct"]
        )
    at = rows[rows["gpu_pct"] == 80].set_index(["model", "batch"])[["service_ms", "predicted_ms"]]
    both = rows.join(at.add_suffix("_80"), on=["model", "batch"])
    ratio = both["predicted_ms"] / both["service_ms"]
    shape = (ratio / (both["predicted_ms_80"] / both["service_ms_80"]) - 1).abs()[both["gpu_pct"] != 80]
    return float(shape.median()), float((ratio - 1).abs().median())


def results(data: Path) -> pd.DataFrame:
    """One row per figure: what, value, reach, and whether it is reached."""
    rows = predictions(data)
    table: list[tuple[str, float, float | None, bool]] = []

    def add(what: str, value: float, reach: float | None = None, least: bool = False) -> None:
        table.append((what, value, reach, reach is None or (value >= reach if least else value <= reach)))

    add("shape error, median, all four networks", float(shape_error(rows).median()), 0.12)
    add("shape error, 90th percentile", float(shape_error(rows).quantile(0.9)))
    trt = rows["runtime"] == "trt"
    add("absolute error, median, TensorRT", float(absolute_error(rows[trt]).median()), 0.30)
    add("absolute error, median, CNTK", float(absolute_error(rows[~trt]).median()))
    for model, group in rows.groupby("model"):
        add(f"  {model}: shape error", float(shape_error(group).median()))
        add(f"  {model}: absolute error", float(absolute_error(group).median()))
    found = knees(rows)
    off = (found["predicted"] - found["measured"]).abs()
    add(f"knee within one step of 10 %, of {len(off)}", float((off <= 10).mean()), 0.80, least=True)
    for name in ORION:
        seen, told = narrow_share(data, name)
        add(f"Orion {name}: time in kernels below 80 SMs {seen:.2f}, model {told:.2f}: off by", abs(told - seen), 0.10)
    shape, absolute = solo_errors(data)
    add("iGniter, TensorRT 8: shape error, median", shape)
    add("iGniter, TensorRT 8: absolute error, median", absolute)
    return pd.DataFrame(table, columns=["figure", "value", "reach", "reached"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the public measurements")
    parser.add_argument("--out", type=Path, help="CSV file to save the table to")
    options = parser.parse_args(arguments)
    if not (options.data / "v100_gslice_authors.csv").is_file():
        print(f"skipped: no v100_gslice_authors.csv in {options.data}; name the folder of the measurements with --data")
        return 0
    table = results(options.data)
    for row in table.itertuples():
        reach = "" if pd.isna(row.reach) else f"  reach {row.reach:.2f}: {'yes' if row.reached else 'NO'}"
        print(f"{row.figure:<76}{row.value:7.3f}{reach}")
    if options.out is not None:
        with whole_file(options.out) as path:
            table.to_csv(path, index=False, float_format="%.4f", lineterminator="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line, for machines without a browser: ``python -m dstack_lab demo|measure|run|probe|figures``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import dstack_lab as lab
from dstack_lab.checks import positive
from dstack_lab.files import require_writable
from dstack_lab.services import Service


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dstack_lab", description="Several neural networks on one GPU.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    demo = verbs.add_parser("demo", help="measure two networks on this machine, plan, and race D-STACK against temporal sharing")
    demo.add_argument("--seconds", type=_above_0, default=15, help="length of each real run [s]")
    demo.add_argument("--out", type=Path, default=Path(), help="folder that gets data/runs/ and figures/")

    measure = verbs.add_parser("measure", help="measure service times on this machine's cores and save a profile")
    measure.add_argument("models", nargs="*", help=f"networks, such as {', '.join(lab.zoo.names()[:3])}")
    measure.add_argument("--batches", type=_numbers(int), default=(1, 2, 4, 8), help="such as 1,2,4,8")
    measure.add_argument("--shares", type=_numbers(float), default=None, help="GPU%% such as 50,100; all that the device grants")
    measure.add_argument("--budget", type=int, default=None, help="most points per network")
    measure.add_argument("--folder", type=Path, help="keeps each finished point, and skips those it holds: to go on after a stop")
    measure.add_argument("--out", type=Path, help="profile to write (data/runs/measured.csv); of --agenda the folder")
    measure.add_argument("--agenda", metavar="ITEM", help="an item of data/README.md on a GPU, such as knee; or status")
    measure.add_argument("--device", default="gpu", help="of --agenda: gpu (MPS and green contexts), mps, green or cpu")
    measure.add_argument("--quick", action="store_true", help="of --agenda: small grids, to try the whole path")
    measure.add_argument("--minutes", type=_above_0, default=9, help="of --agenda: time of this call")
    measure.add_argument("--resume", type=Path, help="of --agenda: folder of an earlier call to go on from")
    measure.add_argument("--keep", action="store_true", help="of --agenda knee: copy the profile to data/profiles")

    run = verbs.add_parser("run", help="run a policy on real workers and save the trace")
    run.add_argument("services", nargs="+", help="model:slo_ms:rate_rps, such as resnet18:200:5")
    run.add_argument("--profile", required=True, help="profile of this device: a path, or a name under data/profiles")
    run.add_argument("--policy", choices=("DStack", "Temporal"), default="DStack")
    run.add_argument("--seconds", type=_above_0, default=10)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--simulate", action="store_true", help="simulate instead")
    server = "ask a Triton server instead: its folder or program here, or host:port (gRPC) of one that runs"
    run.add_argument("--server", metavar="PLACE", help=server)
    run.add_argument("--out", type=Path, default=Path("data/runs/trace.npz"), help="trace to write")

    verbs.add_parser("probe", help="say what this machine can do, and why not; changes nothing")

    figures = verbs.add_parser("figures", help="draw the pictures of the README and the course from the simulated profile")
    figures.add_argument("--out", type=Path, default=Path("figures"))

    options = parser.parse_args(arguments)
    try:
        {"demo": _demo, "measure": _measure, "run": _run, "probe": _probe, "figures": _figures}[options.verb](options)
    except (ValueError, RuntimeError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"dstack_lab {options.verb}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dstack_lab {options.verb}: stopped", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    from dstack_lab.demo import demo

    demo(options.out, options.seconds * 1000)


def _measure(options: argparse.Namespace) -> None:
    if options.agenda is not None:
        from dstack_lab import agenda

        out = options.out or Path("data/recorded")
        if options.agenda == "status":
            print(agenda.status(out))
        else:
            agenda.perform(options.agenda, out, options.device, options.quick, options.minutes, options.resume, options.keep)
        return
    if not options.models:
        raise ValueError("models = []: must be 1 or more networks, or name an item with --agenda")
    out = options.out or Path("data/runs/measured.csv")
    require_writable(out)
    grid = {"batches": options.batches, "shares": options.shares, "budget": options.budget}
    profile = lab.measure(options.models, **grid, folder=options.folder)
    print(profile.table.round(3).to_string(index=False))
    print(profile.provenance)
    print(f"saved {profile.save(out)}")


def _run(options: argparse.Namespace) -> None:
    services = [_service(text) for text in options.services]
    require_writable(options.out)
    policy = getattr(lab, options.policy)()
    plan = lab.optimize(services, lab.load_profile(options.profile))
    print(plan)
    duration = options.seconds * 1000
    if options.server is not None:
        running = re.fullmatch(r"[^/]+:\d+", options.server)
        where = {"url": options.server} if running else {"server": options.server}
        trace = lab.peers.triton(plan, duration_ms=duration, seed=options.seed, progress=True, **where)
    elif options.simulate:
        trace = lab.simulate(plan, policy, duration, options.seed)
    else:
        trace = lab.run(plan, policy, duration_ms=duration, seed=options.seed, progress=True)
    print(lab.summary(trace).round(3).to_string(index=False))
    print(trace.provenance)
    print(f"saved {trace.save(options.out)}")


def _probe(options: argparse.Namespace) -> None:
    print(lab.devices.probe())


def _figures(options: argparse.Namespace) -> None:
    from dstack_lab.gallery import draw

    for path in draw(options.out):
        print(path)


def _service(text: str) -> Service:
    """Read ``model:slo_ms:rate_rps``."""
    try:
        model, slo, rate = text.rsplit(":", 2)
        service: Service = lab.Service(model, float(slo), lab.Poisson(float(rate)))
    except ValueError as error:
        raise ValueError(f"service = {text!r}: must be model:slo_ms:rate_rps, such as resnet18:200:5 ({error})") from error
    return service


def _above_0(text: str) -> float:
    try:
        return positive("value", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number above 0") from error


def _numbers(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    def read(text: str) -> tuple[float, ...]:
        return tuple(kind(part) for part in text.split(","))

    read.__name__ = "comma-separated numbers"
    return read

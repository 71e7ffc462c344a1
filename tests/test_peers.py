"""The client of a Triton server, against a stand-in that speaks its protocol; the real one is in test_peers_server."""

from __future__ import annotations

import builtins
import threading
from types import SimpleNamespace

import builders
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dstack_lab as lab
from dstack_lab.peers.answers import written
from dstack_lab.peers.client import Sent
from dstack_lab.peers.repository import names
from dstack_lab.runner import RunError
from dstack_lab.simulator import sample_arrivals
from dstack_lab.state import NS_PER_MS

pytest.importorskip("tritonclient.grpc", reason="the extra `triton` is not installed")
from fake_triton import FakeTriton, read_config


def plan(*rates, name="net", slo_ms=500.0):
    times = [builders.table(fixed_ms=1, per_item_ms=0.5, batch_max=4), builders.table(fixed_ms=2, per_item_ms=1, batch_max=8)]
    points = [(f"{name} {i}", slo_ms, lab.Poisson(r), 50.0, 4, times[i % 2]) for i, r in enumerate(rates)]
    return builders.plan(*points)


@pytest.fixture
def fake(tmp_path):
    """Start a stand-in for a plan; all are ended when the test ends."""
    running = []

    def start(made, policy=None, seed=0, backend="cpu", **options):
        folder = lab.peers.write_repository(made, tmp_path / str(len(running)), policy, threads=2, seed=seed, backend=backend)
        running.append(FakeTriton(folder, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.end()


# What the server is told


def test_the_repository_says_what_the_policy_says(tmp_path):
    made = plan(10, 20, name='a "quoted" näme/with:odd\\characters')
    folder = lab.peers.write_repository(made, tmp_path, lab.Triton(delay_ms=2.5), threads=3, seed=7)
    assert sorted(p.name for p in folder.iterdir()) == names(made)
    for name, service, most in zip(names(made), made.services, (4, 8), strict=True):
        config = read_config(folder / name / "config.pbtxt")
        assert config.backend == "python"
        assert config.max_batch_size == most
        assert config.dynamic_batching.max_queue_delay_microseconds == 2500
        assert not config.dynamic_batching.preferred_batch_size  # the largest one, then
        (group,) = config.instance_group
        assert (group.count, group.kind) == (1, group.KIND_CPU)
        told = {key: value.string_value for key, value in config.parameters.items()}
        assert told == {"model": service.model, "pool": "64", "threads": "3", "seed": "7", "backend": "cpu"}
        assert "class TritonPythonModel" in (folder / name / "1" / "model.py").read_text()


def test_networks_on_a_gpu(tmp_path, fake):
    made = plan(30)
    (group,) = read_config(next(lab.peers.write_repository(made, tmp_path, backend="cuda").glob("*/config.pbtxt"))).instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, group.KIND_GPU, [0])
    trace = lab.peers.triton(made, duration_ms=200, url=fake(made, backend="cuda").url)
    assert (trace.launches["gpu_pct"] == 100).all()  # processor time says nothing there
    assert "cuda" in trace.provenance.mechanism
    with pytest.raises(ValueError, match="backend = 'tpu': must be one of cpu, cuda"):
        lab.peers.write_repository(made, tmp_path, backend="tpu")


def test_a_smaller_largest_batch(tmp_path):
    folder = lab.peers.write_repository(plan(10, 20), tmp_path, lab.Triton(max_batch=2))
    assert [read_config(p).max_batch_size for p in sorted(folder.glob("*/config.pbtxt"))] == [2, 2]


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [(lab.Triton(drop_late=True), "drop_late = True: must be False"), (lab.DStack(), "follows no other rule")],
)
def test_a_rule_that_the_server_does_not_follow(tmp_path, policy, sentence):
    with pytest.raises(ValueError, match=sentence):
        lab.peers.write_repository(plan(10), tmp_path, policy)


# From answers to a trace


def answered(trace: lab.Trace) -> Sent:
    """Answers such as a server would give that did what a simulated one did."""
    requests, launches = trace.requests, trace.launches.set_index("launch")
    sent = Sent(np.rint(requests["arrival_ms"].to_numpy() * NS_PER_MS).astype(np.int64))
    rank = trace.launches.groupby("service", observed=False).cumcount().add(1).set_axis(launches.index)
    for k, (launch, finish) in enumerate(zip(requests["launch"], requests["finish_ms"], strict=True)):
        if launch >= 0:
            row = launches.loc[launch]
            took = row["end_ms"] - row["start_ms"]
            numbers = np.array([[k % 5, k / 3, rank[launch], row["batch"], took, took * 2 * row["gpu_pct"] / 100]])
            sent.take(k, SimpleNamespace(as_numpy=lambda _, numbers=numbers: numbers), None)
            sent.finish_ns[k] = round(finish * NS_PER_MS)
    return sent


@given(st.lists(st.floats(5, 400), min_size=1, max_size=3), st.integers(0, 99), st.sampled_from([0.0, 3.0]))
def test_batches_are_put_together_again(rates, seed, delay_ms):
    """What a simulated server did, told in answers only, is the simulated trace again."""
    made = plan(*rates)
    was = lab.simulate(made, lab.Triton(delay_ms=delay_ms), 200, seed)
    again = written(made, [*map(len, sample_arrivals(made, 200, seed))], answered(was), 200, 2, "Triton", seed, was.provenance)
    pd.testing.assert_frame_equal(
        again.requests[["service", "arrival_ms", "outcome"]], was.requests[["service", "arrival_ms", "outcome"]]
    )
    for column in ("start_ms", "finish_ms"):
        np.testing.assert_allclose(again.requests[column], was.requests[column], atol=1e-5)
    assert len(again.launches) == len(was.launches)
    key = ["service", "start_ms"]
    ours, theirs = (t.launches.assign(service=t.launches["service"].astype(str)).sort_values(key) for t in (again, was))
    assert (ours["batch"].to_numpy() == theirs["batch"].to_numpy()).all()
    for column in ("start_ms", "end_ms", "gpu_pct", "knee_pct"):
        np.testing.assert_allclose(ours[column], theirs[column], atol=1e-3)
    served = again.requests[again.requests["launch"] >= 0]
    assert served.groupby("launch").size().to_dict() == again.launches.set_index("launch")["batch"].to_dict()


# Against the stand-in


def test_a_run(fake):
    made, policy = plan(60, 40), lab.Triton()
    server = fake(made, policy, seed=3)
    trace = lab.peers.triton(made, policy, duration_ms=500, seed=3, url=server.url)
    simulated = lab.simulate(made, policy, 500, seed=3)
    assert np.allclose(trace.requests["arrival_ms"], simulated.requests["arrival_ms"])
    assert (trace.requests["outcome"] == "served").all()
    number = trace.requests.groupby("service", observed=False).cumcount()  # the stand-in answers with the input's number
    assert (trace.requests["answer"] == number % 10).all()
    assert np.allclose(trace.requests["score"], number / 7)
    assert trace.requests.columns.tolist() == [*simulated.requests.columns, "answer", "score"]
    assert trace.launches.columns.tolist() == [*simulated.launches.columns, "worker_ms"]
    assert trace.launches["batch"].sum() == len(trace.requests)
    for _, mine in trace.launches.groupby("service", observed=False):  # one instance: one batch after the other
        assert (mine["start_ms"].to_numpy()[1:] >= mine["end_ms"].to_numpy()[:-1]).all()
    assert np.allclose(trace.launches["gpu_pct"], 25)  # half the time of one thread of two
    assert trace.events.empty
    assert (trace.policy, trace.provenance.kind) == ("Triton", "measured")
    assert "Triton Inference Server 0.0.1" in trace.provenance.mechanism
    assert server.url in trace.provenance.device
    assert lab.validate(trace)["service"].to_list() == ["net 0", "net 1", "all"]  # the trace carries what it takes


def test_requests_do_not_wait_for_answers(fake):
    """The stand-in answers nothing until it has every request: a client that waits would never send them all."""
    made, all_here = plan(300), threading.Event()
    requests = sample_arrivals(made, 300, 1)[0].size
    server = fake(made, seed=1, before=lambda _: all_here.wait(30))

    def watch():
        while server.received < requests and not all_here.wait(0.01):
            pass
        all_here.set()

    threading.Thread(target=watch, daemon=True).start()
    trace = lab.peers.triton(made, duration_ms=300, seed=1, url=server.url, drain_ms=20_000)
    assert server.received == requests
    assert (trace.requests["outcome"] == "served").all()
    assert trace.launches["batch"].to_list()[1:-1] == [4] * (len(trace.launches) - 2)  # all but the first were full


def test_failed_requests_are_dropped_and_told(fake):
    def fail(inputs):
        if 3 in inputs:
            raise ValueError("no memory left")

    made = plan(40)
    trace = lab.peers.triton(
        made, lab.Triton(max_batch=1), duration_ms=300, url=fake(made, lab.Triton(max_batch=1), before=fail).url
    )
    assert trace.requests["outcome"].to_list().count("dropped") == 1
    assert trace.requests["outcome"][3] == "dropped"
    (event,) = trace.events.itertuples()
    assert (event.kind, event.service, event.detail) == ("failed", "net 0", "1 requests: no memory left")


def test_what_is_not_awaited_is_unserved(fake):
    made, never = plan(30), threading.Event()
    server = fake(made, before=lambda _: never.wait(30))
    trace = lab.peers.triton(made, duration_ms=200, url=server.url, drain_ms=100)
    never.set()
    assert (trace.requests["outcome"] == "unserved").all()
    assert trace.launches.empty
    assert trace.events["detail"].item() == f"{len(trace.requests)} requests had no answer yet: at the end of the drain time"


def test_a_server_that_ends_in_the_middle(fake):
    def end(inputs):
        if 5 in inputs:
            threading.Timer(0.2, server.end).start()

    made = plan(50)
    server = fake(made, before=end)
    with pytest.raises(RunError, match="is gone") as caught:
        lab.peers.triton(made, duration_ms=3000, url=server.url)
    outcomes = caught.value.trace.requests["outcome"].to_list()
    assert outcomes[0] == "served"
    assert {"dropped", "unserved"} & set(outcomes)
    assert "stopped" in caught.value.trace.events["kind"].to_list()


def test_from_a_terminal(fake, tmp_path, capsys):
    from dstack_lab.__main__ import main

    profile = builders.profile(net=(1.0, 0.5, 40.0))
    made = lab.optimize([lab.Service("net", 300, lab.Poisson(20))], profile)
    asked = ["run", "net:300:20", "--profile", str(profile.save(tmp_path / "p.csv")), "--seconds", "0.3", "--seed", "4"]
    assert main([*asked, "--server", fake(made, seed=4).url, "--out", str(tmp_path / "t.npz")]) == 0
    assert "measured, server at 127.0.0.1:" in capsys.readouterr().out
    assert "Triton Inference Server 0.0.1" in lab.load_trace(tmp_path / "t.npz").provenance.mechanism
    assert main([*asked, "--server", str(tmp_path)]) == 2
    assert "must be a Triton Inference Server; install it: " in capsys.readouterr().err


# Errors with a cure


def test_nobody_there(monkeypatch):
    monkeypatch.setattr("dstack_lab.peers.race.LIVE_S", 0.3)
    with pytest.raises(RuntimeError, match=r"no Triton server answers at 127\.0\.0\.1:9"):
        lab.peers.triton(plan(10), url="127.0.0.1:9")


def test_not_ready_in_time(fake):
    made = plan(10)
    with pytest.raises(RuntimeError, match=r"not ready after 0.2 s"):
        lab.peers.triton(made, url=fake(made, ready=False).url, start_timeout_s=0.2)


def test_a_model_is_missing(fake):
    with pytest.raises(ValueError, match="does not serve '1-net_1': give it what write_repository wrote"):
        lab.peers.triton(plan(10, 20), url=fake(plan(10)).url)


def test_the_server_follows_another_rule(fake):
    made = plan(10)
    server = fake(made, lab.Triton(delay_ms=1), seed=2)
    with pytest.raises(ValueError, match="delay_us is 1000, not 0; seed is '2', not '0'"):
        lab.peers.triton(made, url=server.url)


def test_the_extra_is_not_installed(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("tritonclient"):
            raise ModuleNotFoundError("No module named 'tritonclient'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"No module named 'tritonclient'\); install dstack-lab\[triton\]"):
        lab.peers.triton(plan(10), url="localhost:8001")


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8001", ":8001", "localhost:eight"])
def test_a_bad_address(url):
    with pytest.raises(ValueError, match="must be host:port"):
        lab.peers.triton(plan(10), url=url)


@pytest.mark.parametrize(
    "wrong", [{"device": lab.devices.Cpu()}, {"server": "build/triton"}, {"duration_ms": 0}, {"drain_ms": -1}, {"seed": -1}]
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"^(url|duration_ms|drain_ms|seed) = .*: must be"):
        lab.peers.triton(plan(10), url="localhost:8001", **wrong)

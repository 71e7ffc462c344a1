"""Core sets: which shares exist, that they are disjoint, and what this machine's files warn about."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_lab.devices import Cpu, Device, cpu, host


def tree(root, **files):
    """Write a fake /proc and /sys; ``__`` in a name stands for ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def siblings(root, groups):
    for group in groups:
        for core in group:
            path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(map(str, group)) + "\n")
    return root


@pytest.fixture
def eight(monkeypatch):
    """A process that may use 8 logical CPUs, each a core of its own."""
    monkeypatch.setattr(host, "usable_cores", lambda: tuple(range(8)))
    monkeypatch.setattr(host, "core_groups", lambda cores, root=None: tuple((c,) for c in cores))
    return Cpu()


# Reading the machine


def test_hyperthreads_are_grouped_by_core(tmp_path):
    root = siblings(tmp_path, [(0, 4), (1, 5), (2, 6), (3, 7)])
    assert host.core_groups((0, 1, 4, 5, 6), root) == ((0, 4), (1, 5), (6,))
    assert host.core_groups((0, 9), root) == ((0,), (9,))  # 9 has no record


def test_sibling_lists_may_be_ranges(tmp_path):
    root = tree(tmp_path, **{"sys__devices__system__cpu__cpu0__topology__thread_siblings_list": "0-1\n"})
    tree(tmp_path, **{"sys__devices__system__cpu__cpu1__topology__thread_siblings_list": "0-1\n"})
    assert host.core_groups((0, 1), root) == ((0, 1),)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # version 2, own folder and a tighter one above it
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/cpu.max": "50000 100000",
            },
            0.5,
        ),
        # in a container the path told is the host's, the folder seen is the top
        ({"proc/self/cgroup": "0::/docker/123\n", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        # version 1
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        (
            {
                "proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/pod\n",
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "75000",
                "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpuset/x/cpu.cfs_quota_us": "1",
            },
            0.75,
        ),
    ],
)
def test_core_quota(tmp_path, files, cores):
    assert host.quota_cores(tree(tmp_path, **files)) == cores


def test_pressure_load_and_steal(tmp_path):
    assert (host.pressure_pct(tmp_path), host.load_per_core(tmp_path), host.steal_pct(tmp_path)) == (None, None, None)
    tree(
        tmp_path,
        proc__pressure__cpu="some avg10=57.10 avg60=1.00 avg300=0.10 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=0\n",
        proc__loadavg="6.00 1.00 0.50 3/99 1234\n",
        proc__stat="cpu  60 0 20 900 50 0 10 10 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n",
        sys__devices__system__cpu__online="0-2,5\n",
    )
    assert host.pressure_pct(tmp_path) == 57.1
    assert host.load_per_core(tmp_path) == 1.5
    assert host.steal_pct(tmp_path) == 10.0  # of busy time: 60 + 20 + 10 + 10


def test_name_of_the_processor(tmp_path):
    assert host.cpu_name(tree(tmp_path, proc__cpuinfo="processor\t: 0\nmodel name\t: Some CPU 3000\n")) == "Some CPU 3000"
    assert host.cpu_name(tmp_path / "nowhere")


# Shares


def test_a_quarter_of_eight_cores_is_two(eight):
    assert eight.shares() == (12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100)
    assert [eight.cores_for(s) for s in eight.shares()] == list(range(1, 9))
    assert Cpu((0, 3, 5)).shares() == (33.33, 66.67, 100)
    assert Cpu((0, 3, 5)).cores_for(33.3) == 1


@pytest.mark.parametrize(
    ("share", "words"), [(30, "gpu_pct = 30.0: .* nearest 25 or 37.5"), (5, "nearest 12.5"), (0, "gpu_pct = 0"), (101, "101")]
)
def test_a_share_between_two_cores_names_its_neighbours(eight, share, words):
    with pytest.raises(ValueError, match=words):
        eight.cores_for(share)


@given(st.data())
def test_split_shares_are_disjoint_and_of_the_right_size(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "usable_cores", lambda: tuple(range(8)))
        patch.setattr(host, "core_groups", lambda cores, root=None: tuple((c,) for c in cores))
        numbers = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
        shares = [12.5 * k for k in numbers]
        if sum(numbers) > 8:
            with pytest.raises(ValueError, match="sum of gpu_pct"):
                Cpu().split(*shares)
            return
        sets = Cpu().split(*shares)
        assert list(map(len, sets)) == numbers
        assert len(set().union(*sets)) == sum(numbers)
        assert set().union(*sets) <= set(range(8))


def test_one_thread_of_each_core_is_handed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: (0, 1, 2, 3))
    root = siblings(tmp_path, [(0, 2), (1, 3)])
    assert Cpu().slots(root) == (0, 1)
    (mark,) = Cpu().marks(root)
    assert mark == "hyperthreads: 4 logical CPUs are 2 cores; one thread of each core is used"


@pytest.mark.parametrize("cores", [(), (1, 1), (-1,), (0.5,)])
def test_cores_must_be_different_numbers(cores):
    with pytest.raises(ValueError, match="core"):
        Cpu(cores)


def test_a_core_that_this_process_may_not_use_is_named(eight):
    assert Cpu((3, 99)).cores == (3, 99)  # constructing touches nothing
    with pytest.raises(ValueError, match=r"cores = \(3, 99\): must be among"):
        Cpu((3, 99)).shares()
    with pytest.raises(ValueError, match=r"cores = \(0, 0\): must be 2 different ones"):
        eight.start("alexnet", 25, cores=(0, 0))
    with pytest.raises(ValueError, match="cores = "):
        eight.start("alexnet", 25, cores=(0,))


def test_it_is_a_device():
    assert isinstance(Cpu(), Device)
    assert Cpu().describe().endswith(("core", "cores"))


# Reservations


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"sys/fs/cgroup/cpu.max": "300000 100000"}, "core quota"),
        ({"proc/pressure/cpu": f"some avg10={cpu.PRESSURE_LIMIT_PCT + 1} avg60=0 avg300=0 total=0"}, "oversubscribed"),
        ({"proc/loadavg": "17 1 1 1/9 1", "sys/devices/system/cpu/online": "0-7"}, "oversubscribed"),
        ({"proc/stat": "cpu 50 0 0 0 0 0 0 50 0 0"}, "stolen time"),
    ],
)
def test_each_reservation_is_told(eight, tmp_path, files, kind):
    (mark,) = eight.marks(tree(tmp_path, **files))
    assert mark.startswith(f"{kind}: ")


def test_a_quiet_machine_has_no_reservations(eight, tmp_path):
    tree(
        tmp_path,
        **{"sys/fs/cgroup/cpu.max": "800000 100000", "proc/pressure/cpu": f"some avg10={cpu.PRESSURE_LIMIT_PCT} avg60=0 total=0"},
        **{"proc/loadavg": "8 1 1 1/9 1", "sys/devices/system/cpu/online": "0-7", "proc/stat": "cpu 100 0 0 0 0 0 0 1 0 0"},
    )
    assert eight.marks(tmp_path) == ()


def test_one_core_cannot_be_shared_in_space(eight, tmp_path):
    (mark,) = Cpu((2,)).marks(tmp_path)
    assert mark.startswith("one core: ")


# Real workers


def masks(worker):
    """Cores each thread of a worker may run on."""
    return [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{worker.pid}/task").iterdir()]


NETWORK = "import torch\ndef net(): return torch.nn.Linear(8, 4), torch.randn(16, 8)\n"


@pytest.mark.slow
@pytest.mark.skipif(len(Cpu().slots()) < 2, reason="needs 2 cores")
def test_two_workers_never_meet_on_a_core_and_can_change_places(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    device = Cpu(Cpu().slots()[:2])
    one, two = device.split(50, 50)
    with device.start(f"{tmp_path}/net.py:net", 50, one) as a, device.start(f"{tmp_path}/net.py:net", 50, two) as b:
        assert a.wait_ready(60)["cores"] == list(one)
        assert b.wait_ready(60)["cores"] == list(two)
        assert set().union(*masks(a)) == set(one)
        assert set().union(*masks(b)) == set(two)
        a.pin(two)
        b.pin(one)
        assert (set().union(*masks(a)), set().union(*masks(b))) == (set(two), set(one))
        with pytest.raises(ValueError, match="cores = "):
            a.pin([100000])


@pytest.mark.slow
@pytest.mark.skipif(len(Cpu().slots()) < 2, reason="needs 2 cores")
def test_the_threads_of_one_worker_have_a_core_each(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    device = Cpu(Cpu().slots()[:2])
    with device.start(f"{tmp_path}/net.py:net", 100) as worker:
        team = worker.wait_ready(60)["facts"]["team"]
        assert len(team) == 2
        assert [os.sched_getaffinity(t) for t in team] == [{c} for c in device.cores]
        worker.pin(device.cores[:1])
        assert masks(worker) == [{device.cores[0]}] * len(masks(worker))
        worker.ask({"op": "run", "inputs": [0], "threads": 1}, 10)
        worker.pin(reversed(device.cores))
        assert [os.sched_getaffinity(t) for t in team] == [{c} for c in device.cores]


@pytest.mark.slow
@pytest.mark.skipif(len(Cpu().slots()) < 2, reason="needs 2 cores")
def test_threads_that_join_later_get_the_cores_that_were_leased(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    device = Cpu(Cpu().slots()[:2])
    with device.start(f"{tmp_path}/net.py:net", 50) as worker:
        worker.wait_ready(60)
        worker.pin(device.cores)
        worker.ask({"op": "run", "inputs": [0], "threads": 2}, 10)
        assert set().union(*masks(worker)) == set(device.cores)

"""The zoo: right networks, right sizes, and errors that help."""

import subprocess
import sys

import pytest
import torch

from dstack_lab import zoo

IMAGE_NETWORKS = tuple(n for n in zoo.names() if n != "bert_base")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_parameters_are_those_torchvision_publishes(name):
    network = zoo.load(name, device="meta")
    published = zoo.torchvision_models().get_model_weights(name).DEFAULT.meta["num_params"]
    assert parameters(network.module) == published


def test_bert_base_has_the_published_number_of_parameters():
    assert parameters(zoo.load("bert_base", device="meta").module) == 109_482_240  # bert-base-uncased with its pooler


@pytest.mark.parametrize("name", zoo.names())
def test_every_network_runs_on_meta_at_any_batch(name):
    network = zoo.load(name, device="meta")
    assert not network.module.training
    assert not any(p.requires_grad for p in network.module.parameters())
    torch.backends.mha.set_fastpath_enabled(False)  # it has no meta form
    try:
        out = network.module(*network.example(3))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    out = out[1] if isinstance(out, tuple) else out
    assert tuple(out.shape) == (3, 768 if name == "bert_base" else 1000)


def test_the_same_seed_gives_the_same_numbers_and_leaves_torch_s_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (zoo.load("squeezenet1_1", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    x = first.example(2)[0]
    assert x.shape == (2, 3, 224, 224)
    assert torch.equal(x, again.example(2)[0])
    assert not torch.equal(x, other.example(2)[0])
    assert torch.equal(first.module(x), again.module(x))
    assert not torch.equal(first.module(x), other.module(x))


def test_bert_attends_to_every_token():
    network = zoo.load("bert_base")
    (tokens,) = network.example(1)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 30522
    with torch.inference_mode():
        assert not torch.allclose(network.module(tokens)[1], network.module(changed)[1])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet5", "did you mean 'resnet50'"),
        ("no-such-thing", "alexnet, bert_base"),
        ("no_such_package.module:make", "must be importable"),
        ("missing.py:make", "a file that exists"),
        ("math:sqroot", "the name of a function in math"),
        ("os:getcwd", "a pair"),
        (7, "alexnet"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(name, says):
    with pytest.raises(ValueError, match=says):
        zoo.load(name)


def test_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"weights = 'best': must be None"):
        zoo.load("alexnet", weights="best")
    with pytest.raises(ValueError, match="no trained weights"):
        zoo.load("bert_base", weights="DEFAULT")


def test_trained_weights_without_a_network_say_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="weights=None for random"):
        zoo.load("squeezenet1_1", weights="DEFAULT")


OWN = """
import torch
def make():
    return torch.nn.Linear(4, 2), torch.arange(8.0).reshape(2, 4)
def bad():
    return torch.nn.Linear(4, 2), (torch.zeros(2, 4), torch.zeros(3, 4))
"""


def test_a_network_of_one_s_own_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    network = zoo.load(f"{tmp_path / 'mine.py'}:make")
    (x,) = network.example(5)
    assert network.name == "make"
    assert torch.equal(x, torch.arange(8.0).reshape(2, 4)[[0, 1, 0, 1, 0]])
    assert network.module(x).shape == (5, 2)
    assert zoo.load(f"{tmp_path / 'mine.py'}:make", device="meta").example(3)[0].is_meta
    with pytest.raises(ValueError, match=r"example\[1\] shape = \(3, 4\)"):
        zoo.load(f"{tmp_path / 'mine.py'}:bad")


def test_a_network_of_one_s_own_from_a_package(tmp_path, monkeypatch):
    (tmp_path / "zoo_test_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert zoo.load("zoo_test_mine:make").module(torch.zeros(1, 4)).shape == (1, 2)


def test_importing_the_zoo_imports_no_torch():
    code = "import sys, dstack_lab.zoo as z; z.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


OPERATORS_LOAD = """
import sys, types, torch
real = torch.library.Library("torchvision", "DEF")
real.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
real.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from dstack_lab import vision, zoo
zoo.torchvision_models()
assert vision.DECLARED == []
"""


def test_nothing_is_declared_where_the_operators_are_there():
    subprocess.run([sys.executable, "-c", OPERATORS_LOAD], check=True)


def test_a_network_is_loaded_without_the_compiler_and_who_wants_it_gets_it():
    code = """import sys; from dstack_lab import zoo
zoo.load("squeezenet1_1", seed=0)
print("torch._dynamo" in sys.modules)
import torch._dynamo.utils
print(torch._dynamo.utils.__file__.endswith("utils.py"), callable(torch._dynamo.optimize))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]

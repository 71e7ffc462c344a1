"""Networks by name: a torch module ready for inference, and example inputs for it.

torch is imported inside the functions, so that importing this file costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstack_lab.checks import count, require
from dstack_lab.vision import torchvision_models

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Side of the square input image [pixels] of each torchvision network.
IMAGE_SIDE = {
    "alexnet": 224,
    "inception_v3": 299,
    "mobilenet_v2": 224,
    "resnet18": 224,
    "resnet50": 224,
    "resnext50_32x4d": 224,
    "shufflenet_v2_x1_0": 224,
    "squeezenet1_1": 224,
    "vgg19": 224,
    "vit_b_16": 224,
}

#: Tokens in each example sentence of ``bert_base``.
BERT_TOKENS = 128

#: How to name a network of one's own.
OWN = "'package.module:function' or 'path/to/file.py:function' with function() -> (module, example input)"


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A network ready for inference.

    Parameters
    ----------
    name : str
        What it is called in profiles and plans.
    module : torch.nn.Module
        In evaluation mode; no parameter wants a gradient.
    example : callable
        ``example(batch)`` gives the tuple of input tensors, whose first dimension is `batch`,
        on the module's device. The same batch always gives the same numbers.
    """

    name: str
    module: nn.Module
    example: Callable[[int], tuple[Tensor, ...]]

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), "network.name", self.name, "a non-empty text")
        require(callable(self.module), "network.module", type(self.module).__name__, "a torch.nn.Module")
        require(callable(self.example), "network.example", self.example, "a function of the batch")


def names() -> tuple[str, ...]:
    """Names that `load` knows, in alphabetical order."""
    return tuple(sorted((*IMAGE_SIDE, "bert_base")))


def load(
    name: str, weights: str | None = None, device: str | torch.device = "cpu", seed: int = 0, hollow: bool = False
) -> Network:
    """Build a network by name.

    Parameters
    ----------
    name : str
        One of `names`, or one's own: ``"package.module:function"`` or ``"path/to/file.py:function"``,
        where ``function()`` returns ``(module, example)``; ``example`` is a tensor or a tuple of
        tensors with the batch as first dimension.
    weights : {None, "DEFAULT"}
        Random weights (service times do not depend on them), or torchvision's trained ones,
        which torch downloads once into its cache.
    device : str or torch.device
        ``"meta"`` builds shapes only: no weights, no memory.
    seed : int
        Of the random weights and of the example inputs, 0 or more. Same seed, same numbers on
        every device.
    hollow : bool
        Leave the module's parameters on ``"meta"``, for whoever has them already; the examples are as ever. Trained
        networks and those of one's own are built whole all the same: what they do may depend on their numbers.

    Returns
    -------
    Network
        Images are ``(batch, 3, side, side)`` float32; ``bert_base`` takes token ids
        ``(batch, 128)`` int64.

    Raises
    ------
    ValueError
        If the name is unknown, the weights do not exist or cannot be downloaded, or a function
        of one's own does not return a module and tensors.
    """
    count("seed", seed, least=0)
    require(weights in (None, "DEFAULT"), "weights", weights, "None (random) or 'DEFAULT' (trained)")
    if isinstance(name, str) and ":" in name:
        require(weights is None, "weights", weights, "None for a network of one's own: load them in its function")
        return _load_own(name, device, seed)
    if name not in names():
        close = difflib.get_close_matches(str(name).lower(), names(), n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        require(False, "network", name, f"one of {', '.join(names())}{hint}, or {OWN}")
    if name == "bert_base":
        require(weights is None, "weights", weights, "None: no trained weights are published with torchvision for bert_base")
        from dstack_lab.bert import Bert

        home = "meta" if hollow else device
        return Network(name, _place(_seeded(Bert, home, seed), home), _sentences(Bert.VOCABULARY, device, seed))
    models = torchvision_models()
    home = "meta" if hollow and weights is None else device
    # Inception's auxiliary classifier stays in: its parameters are published with it, and in
    # evaluation mode it is never run. Its own initialisation is slow and warns; the layers' serves.
    extra: dict[str, Any] = {"init_weights": False} if name == "inception_v3" and weights is None else {}
    try:
        module = _seeded(lambda: models.get_model(name, weights=weights, **extra), home, seed, trained=weights is not None)
    except OSError as error:  # URLError is one
        raise ValueError(
            f"weights = {weights!r}: must be reachable or already in torch's cache ({error}); "
            "run once with a network, copy ~/.cache/torch/hub/checkpoints, or pass weights=None for random ones"
        ) from error
    side = IMAGE_SIDE[name]
    return Network(name, _place(module, home), _images(side, device, seed))


def from_module(
    module: nn.Module, example: Tensor | Sequence[Tensor], name: str, device: str | torch.device | None = None
) -> Network:
    """Wrap a module of one's own; it is put in evaluation mode and its gradients are turned off.

    Parameters
    ----------
    module : torch.nn.Module
        Any module; it is changed in place.
    example : tensor or sequence of tensors
        Inputs with the batch (1 or more, the same in each) as first dimension. Other batches
        repeat these rows.
    name : str
        What to call it.
    device : str or torch.device, optional
        Where to move module and inputs; the default leaves them where they are.

    Raises
    ------
    ValueError
        If `module` is no module, or an example is no tensor with a batch dimension.
    """
    import torch

    require(isinstance(module, torch.nn.Module), "module", type(module).__name__, "a torch.nn.Module")
    rows = (example,) if isinstance(example, torch.Tensor) else tuple(example) if isinstance(example, (tuple, list)) else ()
    require(bool(rows), "example", type(example).__name__, "a tensor, or a tuple of 1 or more tensors")
    for i, tensor in enumerate(rows):
        require(isinstance(tensor, torch.Tensor), f"example[{i}]", type(tensor).__name__, "a tensor")
        shape = tuple(tensor.shape)
        same = len(shape) > 0 and shape[0] == rows[0].shape[0] and shape[0] >= 1
        require(same, f"example[{i}] shape", shape, "with the same batch, 1 or more, as first dimension")
    rows = tuple(t.detach() if device is None else t.detach().to(device) for t in rows)

    def take(batch: int) -> tuple[Tensor, ...]:
        count("batch", batch)
        return tuple(t[torch.arange(batch, device=t.device) % t.shape[0]] for t in rows)

    return Network(name, _place(module, device), take)


def _seeded(build: Callable[[], nn.Module], device: str | torch.device, seed: int, trained: bool = False) -> nn.Module:
    """Build on the CPU with `seed` (so that every device gets the same weights), or on meta."""
    import torch

    on_meta = torch.device(device).type == "meta" and not trained
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
        torch.default_generator.manual_seed(seed)
        return build()


def _place(module: nn.Module, device: str | torch.device | None) -> nn.Module:
    module = module.eval().requires_grad_(False)
    return module if device is None else module.to(device)


def _images(side: int, device: str | torch.device, seed: int) -> Callable[[int], tuple[Tensor, ...]]:
    import torch

    def images(batch: int) -> tuple[Tensor, ...]:
        count("batch", batch)
        if torch.device(device).type == "meta":
            return (torch.empty(batch, 3, side, side, device="meta"),)
        source = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, 3, side, side, generator=source).to(device),)

    return images


def _sentences(vocabulary: int, device: str | torch.device, seed: int) -> Callable[[int], tuple[Tensor, ...]]:
    import torch

    def sentences(batch: int) -> tuple[Tensor, ...]:
        count("batch", batch)
        if torch.device(device).type == "meta":
            return (torch.empty(batch, BERT_TOKENS, dtype=torch.int64, device="meta"),)
        source = torch.Generator().manual_seed(seed)
        return (torch.randint(vocabulary, (batch, BERT_TOKENS), generator=source).to(device),)

    return sentences


def _load_own(name: str, device: str | torch.device, seed: int) -> Network:
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            require(path.is_file(), "network", name, f"a file that exists, in the form {OWN}")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            home = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(home)
        else:
            home = importlib.import_module(place)
    except ImportError as error:
        raise ValueError(f"network = {name!r}: must be importable ({error}), in the form {OWN}") from error
    make = getattr(home, function, None)
    require(callable(make), "network", name, f"the name of a function in {place}, in the form {OWN}")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = make()  # type: ignore[misc]
    pair = isinstance(made, tuple) and len(made) == 2
    require(pair, f"result of {name}", type(made).__name__, "a pair (module, example input)")
    return from_module(made[0], made[1], function, device)

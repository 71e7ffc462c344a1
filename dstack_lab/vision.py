"""Import ``torchvision.models``, soon and also where parts of torchvision cannot be had."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

DECLARED: list[Any] = []  # torch forgets a declaration when its Library object dies


def torchvision_models() -> ModuleType:
    """Import ``torchvision.models``, also beside a torch its compiled operators were not built for.

    The compiled library is tried first, by importing. Only if it could not be loaded are the two
    operators that the rest of torchvision refers to declared (without an implementation: image
    classification never calls them), and the import is done again.
    """
    try:
        return _models_without_compiler()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch

    _forget_half()
    schemas = {
        "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }
    for operator, schema in schemas.items():
        if not hasattr(torch.ops.torchvision, operator):
            DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
            DECLARED[-1].define(schema)
    return _models_without_compiler()


def _models_without_compiler() -> ModuleType:
    """Import ``torchvision.models`` without torch's compiler: half of the time in which a worker starts.

    An operator for object detection, which no network here has, asks the compiler whether it may be compiled. While
    it is imported the compiler is a stand-in that says no; whoever imports it later gets the real one.
    """
    utils = ModuleType("torch._dynamo.utils")
    utils.is_compile_supported = lambda device_type: False  # type: ignore[attr-defined]
    stands_in = {"torch._dynamo": ModuleType("torch._dynamo"), utils.__name__: utils}
    if "torch._dynamo" in sys.modules:
        return importlib.import_module("torchvision.models")
    sys.modules |= stands_in
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, AttributeError):  # another torchvision asks the compiler for more
        _forget_half()
    finally:
        for name in stands_in:
            sys.modules.pop(name, None)
    return importlib.import_module("torchvision.models")


def _forget_half() -> None:
    """Forget what an import of torchvision that failed has left behind."""
    for half in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[half]

"""A digest of everything a result depends on: numbers, objects and the code of functions.

Equal contents give equal digests, in any process. A change that cannot alter a result may change
the digest (a result is computed once more); a change that can alter it never keeps the digest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import struct
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

PACKAGE = Path(__file__).parent
#: What Python itself writes into a class, and what never alters a result.
_BY_PYTHON = {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"}
_BY_PYTHON |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "_abc_impl"}


def digest(*values: object) -> str:
    """Return a digest of `values` as 32 hexadecimal digits.

    Parameters
    ----------
    *values : object
        Numbers, texts, arrays, tables, containers, dataclasses, functions, classes, and objects that
        can be pickled. A function counts with its code, defaults, closure and the globals it names,
        a class with its methods, unless it belongs to an installed package: then by its name.

    Raises
    ------
    ValueError
        If something has no content that could be compared, such as an open file.
    """
    hasher = hashlib.sha256()
    seen: set[int] = set()
    for value in values:
        for piece in _pieces(value, seen):
            hasher.update(struct.pack("<q", len(piece)) + piece)  # lengths keep ("ab", "c") and ("a", "bc") apart
    return hasher.hexdigest()[:32]


@functools.cache
def sources() -> str:
    """Digest of this package's code, but for what only draws or runs hardware: a result is as good as the code that made it."""
    files = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    return digest([(str(file), (PACKAGE / file).read_bytes()) for file in files if file.parts[0] not in ("devices", "figures")])


def _pieces(value: Any, seen: set[int]) -> Iterator[bytes]:
    kind = type(value)
    yield kind.__name__.encode()
    if value is None or kind in (bool, int, float, complex, str, bytes) or value is Ellipsis:
        yield repr(value).encode()
    elif isinstance(value, (Path, np.dtype)):
        yield str(value).encode()
    elif isinstance(value, np.generic):
        yield from _pieces(value.item(), seen)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype.str}{value.shape}".encode()
        yield from _pieces(value.tolist(), seen) if value.dtype.hasobject else [np.ascontiguousarray(value).tobytes()]
    elif isinstance(value, pd.DataFrame):
        for name in value.columns:
            yield from _pieces((name, value[name].to_numpy()), seen)
    elif isinstance(value, (pd.Series, pd.Index)):
        yield from _pieces(value.to_numpy(), seen)
    elif kind in (set, frozenset):
        yield from sorted(digest(item).encode() for item in value)
    elif kind in (list, tuple):
        yield str(len(value)).encode()
        for item in value:
            yield from _pieces(item, seen)
    elif isinstance(value, Mapping):
        yield from sorted(digest(key).encode() + digest(item).encode() for key, item in value.items())
    elif id(value) in seen:  # a class that its own methods name, a function that calls itself
        yield b"again"
    else:
        seen.add(id(value))
        yield from _pieces_of_object(value, seen)


def _pieces_of_object(value: Any, seen: set[int]) -> Iterator[bytes]:
    if isinstance(value, types.ModuleType):
        yield value.__name__.encode()
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _pieces((value.co_consts, value.co_names, value.co_varnames, value.co_freevars), seen)
    elif isinstance(value, functools.partial):
        yield from _pieces((value.func, value.args, value.keywords), seen)
    elif isinstance(value, types.MethodType):
        yield from _pieces((value.__func__, value.__self__), seen)
    elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)) and _installed(value):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, types.FunctionType):
        yield from _pieces_of_function(value, seen)
    elif isinstance(value, type):
        yield value.__qualname__.encode()
        for base in value.__bases__:
            yield from _pieces(base, seen)
        for name, member in sorted(vars(value).items()):
            if name not in _BY_PYTHON and not isinstance(member, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                yield from _pieces((name, _inside(member)), seen)
    elif dataclasses.is_dataclass(value):  # what was derived from the fields says nothing more
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
        yield from _pieces((type(value), fields), seen)
    else:
        try:
            recipe = value.__reduce_ex__(4)
        except Exception as error:
            raise ValueError(f"{value!r} has no content to compare: pass folder=None, or use plain values ({error})") from error
        if isinstance(recipe, str):
            yield recipe.encode()
        else:
            make, arguments, *state = recipe
            yield from _pieces((make, arguments, [list(s) if isinstance(s, Iterator) else s for s in state]), seen)


def _pieces_of_function(function: types.FunctionType, seen: set[int]) -> Iterator[bytes]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    yield from _pieces((function.__code__, function.__defaults__, function.__kwdefaults__, cells), seen)
    for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
        yield from _pieces((name, function.__globals__[name]), seen)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a code object and those inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _filled(cell: types.CellType) -> bool:
    try:
        return bool(cell.cell_contents is cell.cell_contents)
    except ValueError:  # not assigned yet
        return False


def _inside(member: Any) -> Any:
    """What a property, a class method or a cached function wraps."""
    if isinstance(member, property):
        return (member.fget, member.fset)
    return inspect.unwrap(getattr(member, "__func__", member))


@functools.cache
def _installed_under() -> tuple[Path, ...]:
    return tuple({Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _installed(value: Any) -> bool:
    """Whether code comes from Python, an installed package or this one, whose versions are known."""
    top = (value.__module__ or "builtins").partition(".")[0]
    if top in (*sys.stdlib_module_names, PACKAGE.name) and top != "__main__":
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and any(Path(file).resolve().is_relative_to(folder) for folder in _installed_under())

"""A user's own model: `file.py:callable` returns `(module, example)`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from planner.errors import PlannerError
from planner.spec.codec import nearest

Example = Callable[[int, int], Mapping[str, Any]]

_STDLIB = {Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "platstdlib")}


@contextlib.contextmanager
def loaded(
    path: Path, function: str, *, device: str = "meta"
) -> Iterator[tuple[nn.Module, Example, dict[str, str]]]:
    """The module on a device, its example, and the digests of the files it was imported from."""
    with imported(path) as file:
        module, example = made_by(file, path, function, device=device)
        yield module, example, _sources(path)


@contextlib.contextmanager
def imported(path: Path) -> Iterator[Any]:
    """A user's file, as Python imports it.

    Modules imported from beside the file are forgotten afterwards, so that two models whose helpers share a
    name never mix.
    """
    before = set(sys.modules)
    name = "planner_user_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the file prints is no result of ours
            file = _imported(path, name)
        yield file
    finally:
        sys.path.remove(str(path.resolve().parent))
        for key in [key for key in set(sys.modules) - before if key == name or _is_local(sys.modules[key], path)]:
            del sys.modules[key]


def made_by(file: Any, path: Path, function: str, *, device: str) -> tuple[nn.Module, Example]:
    """The module and its example that a function of an imported file returns.

    A module that the function itself puts on the meta device stays there.
    """
    with contextlib.redirect_stdout(sys.stderr):
        made = _called(file, path, function, device)
    module, example = _checked(made, path, function)
    has_values = not any(value.is_meta for value in module.parameters())
    return module.to(device) if has_values or device == "meta" else module, example


def _imported(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    imported = importlib.util.module_from_spec(spec)
    sys.modules[name] = imported
    try:
        spec.loader.exec_module(imported)
    except (Exception, SystemExit) as error:
        raise PlannerError(
            "the file of the model cannot be imported",
            value=f"{type(error).__name__}: {error}",
            remedy="run `python FILE` to see it fail, and mend it",
            key="model",
            where=str(path),
        ) from error
    return imported


def _called(imported: Any, path: Path, function: str, device: str) -> Any:
    make = getattr(imported, function, None)
    if not callable(make):
        names = [name for name, value in vars(imported).items() if callable(value) and not name.startswith("_")]
        raise PlannerError(
            "file.py:callable names a function of the file",
            value=function,
            remedy=nearest(function, names) if names else "define it",
            key="model",
            where=str(path),
        )
    try:
        with torch.device(device):
            return make()
    except (Exception, SystemExit) as error:
        raise PlannerError(
            "the callable that makes the model fails",
            value=f"{type(error).__name__}: {error}",
            remedy=f"call it under `with torch.device('{device}')` to see it fail, and mend it",
            key="model",
            where=f"{path}:{function}",
        ) from error


def _checked(made: Any, path: Path, function: str) -> tuple[nn.Module, Example]:
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1]):
        return made[0], made[1]
    raise PlannerError(
        "the callable returns (module, example), where example(batch, seq_len) gives keyword arguments",
        value=type(made).__name__,
        remedy='return module, lambda batch, seq_len: {"tokens": torch.zeros(batch, seq_len, dtype=torch.long)}',
        key="model",
        where=f"{path}:{function}",
    )


def _sources(path: Path) -> dict[str, str]:
    """Digests of the file and of what it imported from beside it."""
    local = {path.resolve()}
    local |= {
        Path(module.__file__ or "").resolve() for module in list(sys.modules.values()) if _is_local(module, path)
    }
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(local)}


def _is_local(module: Any, path: Path) -> bool:
    """Whether a module was imported from the folder of the user's file, or below."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not Path(file).is_absolute() or not Path(file).is_file():
        return False  # torch gives a relative __file__ to modules that have none
    parents = Path(file).resolve().parents
    installed = any(parent.name in ("site-packages", "dist-packages") or parent in _STDLIB for parent in parents)
    return path.resolve().parent in parents and not installed


def in_dtype(module: nn.Module, example: Example, dtype: torch.dtype) -> tuple[nn.Module, Example]:
    """Real floating-point weights, buffers and inputs in the working precision; complex tables stay."""

    def lowered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            parameter.data = lowered(parameter.data)
        for name, buffer in list(child.named_buffers(recurse=False)):
            child._buffers[name] = lowered(buffer)

    def cast_example(batch: int, seq_len: int) -> Mapping[str, Any]:
        given: Any = example(batch, seq_len)
        if not isinstance(given, Mapping):
            return cast("Mapping[str, Any]", given)  # refused where it is used
        return {key: lowered(value) if isinstance(value, torch.Tensor) else value for key, value in given.items()}

    return module, cast_example

"""Numbers for what a user's own module is called with: an example may be zeros, which hide what goes wrong."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from planner.execute.cut import name_of, tensors_in

Inputs = Mapping[str, Any]

# functions whose result holds the values that they are given, elsewhere
_MOVES = frozenset((
    "chunk", "clamp", "clamp_min", "clone", "contiguous", "cpu", "cuda", "detach", "expand", "flatten", "flip",
    "getitem", "int", "long", "masked_fill", "movedim", "narrow", "pad", "permute", "ravel", "reshape", "roll",
    "split", "squeeze", "swapaxes", "to", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view",
    "where",
))  # fmt: skip
_GATHERS = ("gather", "index_select", "take_along_dim")


def drawn(given: Inputs, bounds: Mapping[str, int]) -> dict[str, Any]:
    """An example with random numbers where it has one number all over: fractions, and integers below a bound.

    Integers without a bound stay as they are, and so do flags.
    """
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Any] = {}
    for key, value in given.items():
        found[key] = value
        if not isinstance(value, Tensor):
            continue
        constant = value.numel() > 0 and bool((value == value.flatten()[0]).all())
        if value.is_floating_point():
            drawn_value = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            found[key] = drawn_value if constant else value.double()
        elif constant and key in bounds:
            found[key] = torch.randint(bounds[key], value.shape, generator=generator).to(value.dtype)
    return found


def bounds_of(run: Callable[[], Any], inputs: Inputs) -> tuple[dict[str, int], Any]:
    """How many values each integer of the inputs may have, as far as `run` tells, and what it returns."""
    watch = _Indices(inputs)
    with watch:
        out = run()
    return watch.bounds, out


class _Indices(TorchFunctionMode):
    """Sees which inputs choose rows of a table, classes of a loss, places of a tensor."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.bounds: dict[str, int] = {}
        self._keys: dict[int, tuple[str, Tensor]] = {}  # by identity, which a tensor keeps as long as it is kept
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self._keys[id(value)] = key, value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = name_of(func)
        if func is F.embedding:
            self._choose(_given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight").shape[0])
        elif func in (F.cross_entropy, F.nll_loss):
            scores = _given(args, kwargs, 0, "input")
            self._choose(_given(args, kwargs, 1, "target"), scores.shape[min(1, scores.dim() - 1)])
        elif func is F.one_hot:
            self._choose(_given(args, kwargs, 0, "tensor"), _given(args, kwargs, 1, "num_classes") or -1)
        elif name in _GATHERS:
            source, indices = args[0], [each for each in (*args[1:], *kwargs.values()) if isinstance(each, Tensor)]
            dim = next((each for each in (*args[1:], *kwargs.values()) if isinstance(each, int)), -1)
            self._choose(indices[0] if indices else None, source.shape[dim])
        elif name == "getitem" and isinstance(args[1], Tensor):
            self._choose(args[1], args[0].shape[0])
        if name in _MOVES:
            self._follow(args, kwargs, out)
        return out

    def _choose(self, chosen: Any, count: int) -> None:
        key = self._keys.get(id(chosen))
        if key is not None and count > 0:
            self.bounds[key[0]] = min(count, self.bounds.get(key[0], count))

    def _follow(self, args: Any, kwargs: Any, out: Any) -> None:
        for value in tensors_in((args, kwargs)):
            if id(value) in self._keys:
                key = self._keys[id(value)][0]
                self._keys |= {id(made): (key, made) for made in tensors_in(out) if not made.is_floating_point()}


def _given(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)

"""Numbers for what a user's own module is called with: an example may be zeros, which hide what goes wrong."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from planner.execute.cut import name_of, tensors_in

Inputs = Mapping[str, Any]

# functions whose result holds the values that they are given as they lie, and those that put them elsewhere
_KEEPS = frozenset((
    "clamp", "clamp_min", "clone", "contiguous", "cpu", "cuda", "detach", "int", "long", "masked_fill", "to",
    "type_as", "where",
))  # fmt: skip
_MOVES = _KEEPS | frozenset((
    "chunk", "expand", "flatten", "flip", "getitem", "movedim", "narrow", "pad", "permute", "ravel", "reshape",
    "roll", "split", "squeeze", "swapaxes", "transpose", "unbind", "unflatten", "unsqueeze", "view",
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
        constant = value.numel() > 0 and is_constant(value)
        if value.is_floating_point():
            drawn_value = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            found[key] = drawn_value if constant else value.double()
        elif constant and key in bounds:
            found[key] = torch.randint(bounds[key], value.shape, generator=generator).to(value.dtype)
    return found


def is_constant(value: Tensor) -> bool:
    """One number all over, of which an example means none."""
    return bool((value == value.flatten()[0]).all())


def bounds_of(run: Callable[[], Any], inputs: Inputs) -> tuple[dict[str, int], Any]:
    """How many values each integer of the inputs may have, as far as `run` tells, and what it returns."""
    seen, out = seen_by(run, inputs)
    return seen.bounds, out


@dataclass(slots=True)
class Seen:
    """What a run of a module does with its inputs."""

    bounds: dict[str, int] = field(default_factory=dict)  # how many values an integer may have
    looked_up: set[str] = field(default_factory=set)  # those that choose rows of a table
    classes: set[str] = field(default_factory=set)  # those that a loss compares scores with
    uneven: set[str] = field(default_factory=set)  # why some labels count less in the mean of such a loss
    # of those, and of what is gathered: the first one's place in its sequence, and how many; none if it was lost
    firsts: dict[str, set[tuple[int, int] | None]] = field(default_factory=dict)
    starts: set[int] = field(default_factory=set)  # of fractions that lost one place of the sequence: their first

    def ahead(self, key: str, shape: tuple[int, int]) -> int | None:
        """By how many places a label is ahead of the scores that it is compared with, if all comparisons agree."""
        found: set[int | None] = set()
        for first in self.firsts.get(key, ()):
            starts = {0} if first is not None and first[1] == shape[0] * shape[1] else self.starts
            found |= {None} if first is None or not starts else {first[0] - start for start in starts}
        return found.pop() if len(found) == 1 else None


def seen_by(run: Callable[[], Any], inputs: Inputs, length: int = 0) -> tuple[Seen, Any]:
    """What `run` does with inputs of sequences of this length, and what it returns."""
    watch = _Indices(inputs, length)
    with watch:
        out = run()
    return watch.seen, out


class _Indices(TorchFunctionMode):
    """Sees which inputs choose rows of a table, classes of a loss, places of a tensor."""

    def __init__(self, inputs: Inputs, length: int) -> None:
        super().__init__()
        self.seen, self._length = Seen(), length
        self._keys: dict[int, tuple[str, Tensor]] = {}  # by identity, which a tensor keeps as long as it is kept
        self._places: dict[int, Tensor] = {}  # of the same, where in its sequence each value comes from
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self._keys[id(value)] = key, value
                if value.dim() == 2 and not value.is_floating_point():
                    self._places[id(value)] = torch.arange(value.shape[1], device="cpu").repeat(len(value), 1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = name_of(func)
        if func is F.embedding:
            chosen = _given(args, kwargs, 0, "input")
            self._choose(chosen, _given(args, kwargs, 1, "weight").shape[0])
            self.seen.looked_up |= self._key_of(chosen)
        elif func in (F.cross_entropy, F.nll_loss):
            scores, target = _given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "target")
            count = scores.shape[min(1, scores.dim() - 1)]
            self._choose(target, count)
            self._compare(target)
            self._note_uneven(_given(args, kwargs, 4, "ignore_index"), _given(args, kwargs, 2, "weight"), count)
            self.seen.classes |= self._key_of(target)
        elif func is F.one_hot:
            chosen = _given(args, kwargs, 0, "tensor")
            self._choose(chosen, _given(args, kwargs, 1, "num_classes") or -1)
            self._compare(chosen)
        elif name in _GATHERS:
            source, indices = args[0], [each for each in (*args[1:], *kwargs.values()) if isinstance(each, Tensor)]
            dim = next((each for each in (*args[1:], *kwargs.values()) if isinstance(each, int)), -1)
            self._choose(indices[0] if indices else None, source.shape[dim])
            self._compare(indices[0] if indices else None)
        elif name == "getitem" and isinstance(args[1], Tensor):
            self._choose(args[1], args[0].shape[0])
        if name in _MOVES:
            self._follow(func, args, kwargs, out)
        return out

    def _key_of(self, value: Any) -> set[str]:
        return {self._keys[id(value)][0]} if id(value) in self._keys else set()

    def _choose(self, chosen: Any, count: int) -> None:
        for key in self._key_of(chosen) if count > 0 else ():
            self.seen.bounds[key] = min(count, self.seen.bounds.get(key, count))

    def _note_uneven(self, ignored: int | None, weight: Tensor | None, count: int) -> None:
        if ignored is not None and 0 <= ignored < count:
            self.seen.uneven.add(f"ignore_index {ignored}")
        if weight is not None:
            self.seen.uneven.add("a weight for each class")

    def _compare(self, chosen: Any) -> None:
        """Each label stands against the scores at its place: where those begin, tells the first one."""
        places = self._places.get(id(chosen))
        first = None if places is None or not places.numel() else (int(places.flatten()[0]), places.numel())
        for key in self._key_of(chosen):
            self.seen.firsts.setdefault(key, set()).add(first)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        known = next((x for x in tensors_in((args, kwargs)) if id(x) in self._keys), None)
        if known is None:
            self._note_start(func, args, kwargs, out)
            return
        key = self._keys[id(known)][0]
        made = [x for x in tensors_in(out) if not x.is_floating_point()]
        moved = self._moved(func, args, kwargs, known)
        self._keys |= {id(x): (key, x) for x in made}
        self._places |= {id(x): places for x, places in zip(made, moved, strict=False)}

    def _moved(self, func: Any, args: Any, kwargs: Any, known: Tensor) -> list[Tensor]:
        """The places of what a function makes of an input; none where that depends on values."""
        places = self._places.get(id(known))
        if places is None or name_of(func) in _KEEPS:
            return [] if places is None else [places]
        given = [self._places.get(id(x), x) for x in args]
        by_name = {key: self._places.get(id(x), x) for key, x in kwargs.items()}
        try:
            return [x.contiguous() for x in tensors_in(func(*given, **by_name))]
        except Exception:  # of whatever class: an index of the meta device has no values
            return []

    def _note_start(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        source: Any = args[0] if args else None
        if name_of(func) not in ("getitem", "narrow") or not isinstance(out, Tensor) or source.dim() < 2:
            return
        lost_one = (source.shape[1], out.shape[1:2]) == (self._length, (self._length - 1,))
        if lost_one and out.is_floating_point() and out.numel():
            along = torch.arange(self._length, device="cpu").view(-1, *[1] * (source.dim() - 2))
            places = func(along.expand(source.shape), *args[1:], **kwargs)
            self.seen.starts.add(int(places[(0,) * places.dim()]))


def _given(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)

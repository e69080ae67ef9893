"""A tensor of which each rank holds a part along one dim, and which code of a user's sees as the whole.

Between a column and a row split stands the user's own forward, written for whole tensors. It gets a `Cut`: one
that tells the whole shape and holds this rank's part. Each function it is given to runs on the parts by a rule
that is exact (`cut_rules`); a function without a rule is refused, so nothing is ever computed on half a value
by mistake, and no head count need be found and divided.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily  # there is no public name

from planner.errors import PlannerError
from planner.execute.mesh import Peers
from planner.execute.moves import convert
from planner.execute.parameters import Piece
from planner.spec.plan import Layout

Rule = Callable[["Call"], Any]

_LAYOUTS: dict[int, Layout] = {-1: "features", -2: "sequence"}


class RefusedError(Exception):
    """A function that parts cannot run, and why."""


@dataclass(frozen=True, slots=True)
class Along:
    """Where a tensor is cut: the dim, its whole size, and the fused pieces that make it up, each of them cut.

    `tokens` says that it is the sequence: what a function cannot do with a part of it, it does with the whole.
    `source` is the layer that made it while it is not yet known what it fuses; `unit` is how many of that layer's
    features one step along the dim takes. Where there are fewer heads of keys than ranks, `copies` neighbours hold
    the same one; each of them has the part of its gradient that its own queries give.
    """

    dim: int
    size: int
    peers: Peers
    parts: tuple[int, ...] = ()
    source: Source | None = None
    unit: int = 1
    tokens: bool = False
    copies: int = 1

    @property
    def ranks(self) -> int:
        """How many different parts there are."""
        return self.peers.size // self.copies

    @property
    def number(self) -> int:
        """Which of them this rank holds."""
        return self.peers.rank // self.copies

    def boundaries(self) -> tuple[int, ...]:
        """Where a rank's part of the dim can be taken apart, in whole sizes."""
        return tuple(itertools.accumulate(self.parts or (self.size,), initial=0))

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of something whole."""
        return Piece(dim, self.ranks, self.number, parts=self.parts).of(whole)

    def like(self, other: Along, ndim: int, other_ndim: int) -> bool:
        """Whether two tensors are cut alike, their last dims put below one another."""
        here, there = (self.dim - ndim, self.size), (other.dim - other_ndim, other.size)
        return here == there and (self.parts, self.copies) == (other.parts, other.copies)

    def require_divisible(self, size: int, what: str) -> None:
        """Parts are equal."""
        require_divisible(size, self.peers, what, self.copies)


@dataclass(slots=True)
class Source:
    """A layer whose result the code after it takes apart: the boundaries it was seen to need.

    `fused` has the features between two neighbours of a dim that was taken for heads and then taken apart one by
    one, as are keys and values. `few` has sizes that its features were taken apart in and that leave several ranks
    to each: fused pieces, or heads of keys, of which those ranks then hold `copies`.
    """

    path: str
    size: int
    boundaries: set[int] = field(default_factory=set)
    fused: set[int] = field(default_factory=set)
    few: set[int] = field(default_factory=set)
    copies: int = 1

    def parts(self) -> tuple[int, ...]:
        """The pieces between boundaries; none where there is one."""
        ordered = sorted({0, self.size, *self.boundaries})
        sizes = tuple(after - before for before, after in itertools.pairwise(ordered))
        return sizes if len(sizes) > 1 else ()


class Cut(Tensor):
    """This rank's part, told as the whole. What autograd knows of it hangs on `local`."""

    local: Tensor
    along: Along

    @staticmethod
    def of(local: Tensor, along: Along) -> Cut:
        """A part with the place where it belongs. In a dry run its values are those of another subclass."""
        with unset_fake_temporarily(), torch.no_grad():
            fake = isinstance(local, FakeTensor)
            shell = torch.empty(local.shape, dtype=local.dtype, device="meta") if fake else local.detach()
            cut = shell.as_subclass(Cut)
        cut.local, cut.along = local, along
        return cut

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from planner.execute.cut_rules import rule_of

        call = Call(name_of(func), func, tuple(args), dict(kwargs or {}))
        try:
            return rule_of(call)(call)
        except RefusedError:
            if not all(cut.along.tokens for cut in call.cuts()):
                raise
        return call.on_whole()

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape that code sees."""
        sizes = list(self.local.shape)
        sizes[self.along.dim] = self.along.size
        return tuple(sizes)


@dataclass(slots=True)
class Call:
    """A torch function as it was called."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def cuts(self) -> Iterator[Cut]:
        """The cut tensors among the arguments."""
        for value in (*self.args, *self.kwargs.values()):
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Cut):
                    yield each

    @property
    def in_place(self) -> bool:
        """Whether the first argument is computed anew where it lies."""
        return self.name.endswith("_") or self.name in ("iadd", "imul", "isub", "idiv", "itruediv")

    @property
    def writes_elsewhere(self) -> bool:
        """Whether the result goes into a tensor that is given for it."""
        return self.kwargs.get("out") is not None

    def first(self) -> Cut:
        """The cut tensor that the function works on."""
        if self.args and isinstance(self.args[0], Cut):
            return self.args[0]
        given = self.kwargs.get("input")
        if isinstance(given, Cut):
            self.args = (self.kwargs.pop("input"), *self.args)
            return given
        raise RefusedError("a whole tensor is changed or read by a part of one")

    def value(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def dims(self, place: int, name: str = "dim", default: Any = None) -> tuple[int, ...] | None:
        """Dims that a function names, from 0 on; None where it names none."""
        given = self.value(place, name, self.kwargs.get("axis", default))
        if given is None or isinstance(given, bool) or given in ((), []):  # a flag comes first, as in std(False)
            return None
        ndim = self.first().local.dim()
        return tuple(each % ndim for each in (given if isinstance(given, (list, tuple)) else (given,)))

    def refused(self, why: str) -> RefusedError:
        """What to raise."""
        return RefusedError(f"{self.name}: {why}")

    def on_parts(self, convert_whole: Callable[[Tensor], Tensor] | None = None, **changed: Any) -> Any:
        """The function run on this rank's parts; other tensors go through `convert_whole`."""

        def own(value: Any) -> Any:
            if isinstance(value, Cut):
                return value.local
            if isinstance(value, Tensor) and convert_whole is not None:
                return convert_whole(value)
            return type(value)(own(each) for each in value) if type(value) in (list, tuple) else value

        kwargs = self.kwargs | changed
        return self.func(*(own(value) for value in self.args), **{key: own(kwargs[key]) for key in kwargs})

    def on_whole(self) -> Any:
        """The function run on gathered tensors, on every rank the same."""
        if self.in_place or self.writes_elsewhere or self.name == "setitem":
            raise self.refused("a gathered tensor would be changed, and not its part")

        def whole(value: Any) -> Any:
            if isinstance(value, Cut):
                return gathered(value, value.along.peers)
            return type(value)(whole(each) for each in value) if type(value) in (list, tuple) else value

        return self.func(*(whole(value) for value in self.args), **{k: whole(v) for k, v in self.kwargs.items()})


def along_of(x: Any) -> Along | None:
    """Where something is cut; None of what is whole."""
    return x.along if isinstance(x, Cut) else None


def part_of(x: Any) -> Any:
    """What this rank has of something: its part, or all of it."""
    return x.local if isinstance(x, Cut) else x


def put_back(part: Any, along: Along | None) -> Any:
    """A part as what it was taken from."""
    return part if along is None else Cut.of(part, along)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of arguments or results, parts of those that are cut."""
    if isinstance(value, Tensor):
        yield part_of(value)
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def name_of(func: Any) -> str:
    """`add` for torch.add, Tensor.add and +; `get shape` for an attribute."""
    name: str = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')} {getattr(func.__self__, '__name__', '?')}"
    return name.removeprefix("__").removesuffix("__") if name.startswith("__") else name


def entering(x: Tensor, peers: Peers, *, in_place: bool = False) -> Tensor:
    """A whole tensor read by parts: its gradient is a sum over ranks, made `in_place` if no other has it."""
    if not x.requires_grad:
        return x
    if x.is_meta:
        met: Tensor = Met.apply(x)
        return met
    if is_summed(x):
        return x
    read: Tensor = convert(x, "replicate", "replicate", peers, gradient="partial")
    return read if in_place else _CopiedGradient.apply(read)


def met_by(x: Tensor, call: Call, along: Along, k: int) -> Tensor:
    """A whole operand beside one that is cut along dim k, counted from the end: this rank's part of it."""
    if x.dim() < -k or x.shape[k] == 1:
        return entering(x, along.peers)
    if x.shape[k] != along.size:
        raise call.refused(f"a tensor of {list(x.shape)} beside one with {along.size} at dim {k}")
    return along.own(entering(x, along.peers), x.dim() + k)


class Met(torch.autograd.Function):
    """Marks, where shapes alone are run, that a whole tensor is read by parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _CopiedGradient(torch.autograd.Function):
    """Copies a gradient that is then summed in place: `a + b` hands one and the same tensor to both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].clone()


def gathered(x: Tensor, peers: Peers, *, gradient: Any = "same") -> Tensor:
    """Whole, whatever it was. With a partial gradient, for products that each rank has some features of."""
    if not isinstance(x, Cut):
        return entering(x, peers, in_place=True) if gradient == "partial" else x  # read by products alone
    along = x.along
    layout = _LAYOUTS.get(along.dim - x.local.dim())
    if layout is None or along.parts or along.copies > 1:
        raise RefusedError("a tensor cut by heads, or fused, is wanted whole")
    if x.local.is_meta:
        return torch.cat([x.local] * peers.size, along.dim)
    return convert(x.local, layout, "replicate", peers, gradient=gradient)


def summed_up(part: Tensor, layout: Layout, peers: Peers) -> Tensor:
    """Summands of all ranks put together: whole, or cut along the sequence."""
    along = part.dim() - 2
    if layout == "sequence":
        require_divisible(part.shape[along], peers, "tokens")
        whole = part.shape[along]
        if part.is_meta:
            own = part.narrow(along, 0, whole // peers.size)
        else:
            own = convert(part, "partial", "sequence", peers)
        return Cut.of(own, Along(along, whole, peers, tokens=True))
    return part if part.is_meta else convert(part, "partial", "replicate", peers)


def own_features(x: Tensor, peers: Peers) -> Tensor:
    """This rank's features, of a tensor that is cut so or whole."""
    if not isinstance(x, Cut):
        return Along(x.dim() - 1, x.shape[-1], peers).own(x, x.dim() - 1) if x.is_meta else _features(x, peers)
    if x.along.dim != x.local.dim() - 1 or x.along.parts or x.along.copies > 1:
        raise RefusedError("a row split reads features in the order of its weight; these are cut otherwise")
    return x.local


def _features(x: Tensor, peers: Peers) -> Tensor:
    return convert(x, "replicate", "features", peers)


def require_divisible(size: int, peers: Peers, what: str, copies: int = 1) -> None:
    """Parts are equal."""
    if size % (peers.size // copies):
        raise RefusedError(f"{size} {what} are no multiple of tp {peers.size}")


_SUMMED = "_planner_summed"


def mark_summed(x: Tensor) -> Tensor:
    """A weight whose gradient is summed once a step: its parts go on as they are."""
    setattr(x, _SUMMED, True)
    return x


def is_summed(x: Tensor) -> bool:
    """Whether it is one."""
    return getattr(x, _SUMMED, False)


def refusal(error: RefusedError, where: str) -> PlannerError:
    """What a person reads."""
    return PlannerError(
        "between the splits of a module of one's own runs only what each rank can do with its part",
        value=f"{error} ({where})" if where else str(error),
        remedy="write split: replicate for the modules around it (input and output as the others have them), or "
        "plan with --fix sp=false or tp=1",
        key="modules",
    )


def moved_to(along: Along, dim: int) -> Along:
    """The same, at another dim."""
    return replace(along, dim=dim)

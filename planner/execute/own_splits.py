"""Tensor parallelism inside a user's own module: linear layers and tables cut as the plan says, the rest as it is.

A column split hands its caller a `Cut`, a row split takes one; what stands between is the user's code, which runs
on the parts by exact rules. Before any weight is cut the module runs once on its example, shapes alone: what has
no rule is refused then, fused layers are seen where they are taken apart, and so are weights that are read by
parts alone, whose gradients are summed once a step.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from planner.errors import PlannerError
from planner.execute.cut import (
    Cut,
    Met,
    RefusedError,
    along_of,
    gathered,
    mark_summed,
    name_of,
    part_of,
    put_back,
    refusal,
    tensors_in,
)
from planner.execute.mesh import Peers
from planner.execute.own_layers import CUT, CutModule, cut_module, forward_of
from planner.execute.parameters import Summed, cut, keep_whole, replace_forward
from planner.execute.styles import SharedInput
from planner.spec.paths import lookup
from planner.spec.plan import ModuleSplit

Inputs = Mapping[str, Any]


class OwnSplits:
    """The lines of a plan in a module on the meta device."""

    def __init__(
        self, module: nn.Module, lines: Mapping[str, ModuleSplit], peers: Peers, groups: Sequence[nn.Module]
    ) -> None:
        """`groups` are blocks whose weights are gathered together, then the whole."""
        self.module, self.peers = module, peers
        self.cut: dict[str, CutModule] = {}
        for path, child in module.named_modules():
            line = lookup(lines, path) if path else None
            along = line is not None and line.split == "sequence" and isinstance(child, nn.Embedding)
            if line is not None and (line.split in CUT or along) and child._parameters:
                self.cut[path] = cut_module(path, child, line, peers)
        self.summed: list[Summed] = []
        self._wrap(groups)

    def examine(self, run: Callable[[], Any]) -> None:
        """Run the module on its example, shapes alone; within `hidden`."""
        with _no_functions_of_parts():
            self._see(run)
            for each in self.cut.values():
                each.parts, each.notes = each.source.parts(), False
            self.summed = self._read_by_parts(run())

    def _see(self, run: Callable[[], Any]) -> None:
        """Run until nothing new is found of what layers fuse. Where parts cannot be had that way, heads that are
        fewer than ranks may have stood where fused pieces were supposed."""
        try:
            while self._sees_more(run):
                pass
        except PlannerError as refused:
            if not self._copy_few_heads():
                raise
            try:
                self._see(run)
            except PlannerError:
                raise refused from None

    def _copy_few_heads(self) -> bool:
        """Let ranks hold copies of heads that there are too few of; whether there are any."""
        found = [
            each.source for each in self.cut.values() if len(each.source.few) == 1 and each.source.copies == 1
        ]
        for source in found:
            source.copies = self.peers.size // max(source.few)
            source.boundaries.clear()
        return bool(found)

    @property
    def copies(self) -> int:
        """How many neighbouring ranks hold the same heads of keys and values."""
        counts = {each.source.copies for each in self.cut.values()} - {1}
        if len(counts) > 1:
            raise PlannerError(
                "layers with fewer heads than tp have equally many",
                value=f"heads for tp {self.peers.size}: {sorted(self.peers.size // count for count in counts)}",
                remedy="write split: replicate for the attention of one kind, or plan with a smaller tp",
                key="modules",
            )
        return max(counts, default=1)

    def _sees_more(self, run: Callable[[], Any]) -> bool:
        """Whether a run found dims of what is fused that it had cut as heads; it is told nothing else then."""
        before = [set(each.source.fused) for each in self.cut.values()]

        def more() -> bool:
            return [each.source.fused for each in self.cut.values()] != before

        try:
            run()
        except PlannerError:
            if not more():
                raise
        return more()

    def apply(self, mesh: DeviceMesh, same_head: Peers) -> None:
        """Keep this rank's pieces, everything on the tensor-parallel mesh.

        `same_head` are the ranks that hold copies of a head: each has a part of its gradient.
        """
        self.summed = [entry for entry in self.summed if _is_trained(entry.module._parameters.get(entry.name))]
        for path, module in self.module.named_modules():
            made = self.cut.get(path)
            for name, value in list(module._parameters.items()):
                if value is None:
                    continue
                piece = made.piece(name) if made is not None and made.plan.split != "sequence" else None
                if piece is None:
                    keep_whole(module, name, mesh)
                else:
                    cut(module, name, mesh, piece)
                    if made is not None and made.source.copies > 1 and value.requires_grad:
                        self.summed.append(Summed(module, name, same_head))

    def _wrap(self, groups: Sequence[nn.Module]) -> None:
        taken: set[int] = set()
        for group in groups:
            shared = SharedInput(group)
            inside = [module for module in group.modules() if id(module) not in taken]
            taken |= {id(module) for module in inside}
            ours = {id(each.module): each for each in self.cut.values()}
            for module in inside:
                if id(module) in ours:
                    replace_forward(module, forward_of(ours[id(module)], shared))
            replace_forward(group, partial(self._whole_inside, inside))

    def _whole_inside(self, modules: list[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._plain(modules):
                return forward(*args, **kwargs)

        return run

    @contextmanager
    def _plain(self, modules: list[nn.Module]) -> Iterator[None]:
        """Whole weights as the plain tensors that the user's code expects."""
        summed = {(id(entry.module), entry.name) for entry in self.summed}
        kept: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module in modules:
                parameters: dict[str, Any] = module._parameters
                for name, value in list(parameters.items()):
                    if isinstance(value, DTensor) and all(place.is_replicate() for place in value.placements):
                        kept.append((parameters, name, value))
                        plain: Any = value.to_local()
                        parameters[name] = mark_summed(plain) if (id(module), name) in summed else plain
            yield
        finally:
            for parameters, name, value in kept:
                parameters[name] = value

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Cut weights for none but their own modules to read."""
        for each in self.cut.values():
            parameters: dict[str, Any] = each.module._parameters
            each.whole = {name: value for name, value in parameters.items() if value is not None}
            for name in each.whole:
                if each.plan.split != "sequence" and each.piece(name) is not None:
                    parameters[name] = Hidden.of(each.whole[name], f"{each.path}.{name}")
        try:
            yield
        finally:
            for each in self.cut.values():
                held: dict[str, Any] = each.module._parameters
                held |= {name: each.whole[name] for name, value in held.items() if isinstance(value, Hidden)}
                each.whole = {}

    def _read_by_parts(self, out: Any) -> list[Summed]:
        """Weights that are whole, and of whose reading each rank does a part only."""
        readers: dict[int, set[bool]] = {}
        for parameter, by_part in readers_of(out):
            readers.setdefault(id(parameter), set()).add(by_part)
        found = []
        for module in self.module.modules():
            for name, value in module._parameters.items():
                if value is not None and readers.get(id(value)) == {True}:
                    found.append(Summed(module, name, self.peers))
        return found


def _is_trained(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad


@contextmanager
def weights_as(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights on the meta device in the dtype of a step: on it depends whether `.float()` gives the weight.

    All of them take gradients for so long, which show who reads a weight that is not trained.
    """
    weights = [weight for weight in module.parameters() if weight.is_floating_point()]
    kept = [(weight, weight.dtype, weight.requires_grad) for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(dtype)
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, before, trained in kept:
            weight.data = weight.data.to(before)
            weight.requires_grad_(trained)


def run_on_example(module: nn.Module, inputs: Inputs, *, otherwise: str = "plan with --fix tp=1,pp=1") -> Any:
    """A module on the meta device, run once; `otherwise` is what a user does whose module cannot."""
    try:
        with torch.device("meta"):
            return module(**inputs)
    except RefusedError as error:
        raise refusal(error, place_of(error)) from None
    except PlannerError:
        raise
    except Exception as error:
        raise PlannerError(
            "the module runs on its example, shapes alone, each rank with its parts",
            value=f"{type(error).__name__}: {error} ({place_of(error)})",
            remedy=f"make example(batch, seq_len) fit the module, or {otherwise}",
            key="model",
        ) from error


_KNOWN_OF_HIDDEN = frozenset((
    "shape", "size", "dim", "ndim", "numel", "nelement", "dtype", "device", "layout", "is_meta", "is_cuda",
    "is_cpu", "requires_grad", "is_leaf", "is_floating_point", "is_sparse", "grad_fn", "repr",
))  # fmt: skip


class Hidden(Tensor):
    """A weight that is cut: what reads it outside of its module would take a part for the whole."""

    path: str

    @staticmethod
    def of(weight: Tensor, path: str) -> Hidden:
        """The weight, hidden."""
        hidden = weight.detach().as_subclass(Hidden)
        hidden.path = path
        return hidden

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func).removeprefix("get ") in _KNOWN_OF_HIDDEN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        given = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Hidden)]
        path = given[0].path if given else "a weight"
        raise RefusedError(f"{path}, of which each rank has a part, is read outside of its module")


def whole_output(out: Any) -> Any:
    """What a module returns, gathered where each rank has a part."""
    if isinstance(out, Cut):
        return gathered(out, out.along.peers)
    if type(out) in (list, tuple):
        return type(out)(whole_output(each) for each in out)
    if isinstance(out, dict):
        for key, value in out.items():
            if isinstance(value, Cut):
                out[key] = whole_output(value)
    return out


def carry(blocks: Sequence[nn.Module]) -> None:
    """Let parts pass the hooks of sharding, which know plain tensors only."""
    for block in blocks:
        _carried(block)


def _carried(block: nn.Module) -> None:
    places: list[tuple[Any, Any]] = []

    def take(_: nn.Module, args: Any, kwargs: Any) -> Any:
        places.append(([along_of(x) for x in args], {key: along_of(x) for key, x in kwargs.items()}))
        return tuple(part_of(x) for x in args), {key: part_of(x) for key, x in kwargs.items()}

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            by_place, by_name = places.pop()
            again = [put_back(x, along) for x, along in zip(args, by_place, strict=True)]
            return forward(*again, **{key: put_back(x, by_name[key]) for key, x in kwargs.items()})

        return run

    replace_forward(block, wrap)
    block.register_forward_pre_hook(take, prepend=True, with_kwargs=True)


@contextmanager
def _no_functions_of_parts() -> Iterator[None]:
    """A function that computes its own gradient is a closed book: it does not get parts."""
    usual: Any = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") and any(
            isinstance(each, Cut) for each in (*args, *kwargs.values())
        ):
            raise RefusedError(f"{cls.__name__}.apply: an autograd function of one's own is given a part")
        return usual.__get__(None, cls)(*args, **kwargs)

    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010  mypy knows better
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", usual)  # noqa: B010


def readers_of(out: Any) -> Iterator[tuple[Tensor, bool]]:
    """Every weight that a result depends on, with whether this reader of it is a part's."""
    waiting = [x.grad_fn for x in tensors_in(out) if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node: Any = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None:
                yield variable, node.name() == f"{Met.__name__}Backward"
            elif following not in seen:
                seen.add(following)
                waiting.append(following)


def place_of(error: BaseException) -> str:
    """The line of the user's code that an error comes from: the last one outside of torch and of ours."""
    inner = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(inner)]
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}, {lines[-1].line}" if lines else ""

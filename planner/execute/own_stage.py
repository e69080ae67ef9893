"""A pipeline stage of a user's own module: the module itself, of which earlier layers hand on and later ones stop.

The user's forward runs on every stage from its inputs, so masks and positions that it makes of them are there.
The first layer of a stage takes what was received instead of what comes along, which is nothing on a later stage:
modules in front of the layers give numbers that are none. That nothing but the hidden state leads from one layer
to the next, or around them, is seen before any weight is dropped, from what depends on which weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.cut import Along, Cut, along_of, part_of, put_back, tensors_in
from planner.execute.own_splits import readers_of
from planner.execute.parameters import replace_forward, replaced
from planner.spec.paths import Span

Run = Callable[[], Any]


class _StoppedError(Exception):
    """A stage that is not the last ends where a later one's layers start."""

    def __init__(self, x: Any) -> None:
        super().__init__("a later stage's layer")
        self.x = x


@dataclass(slots=True)
class Between:
    """The hidden state that goes from stage to stage: what one rank sends."""

    shape: tuple[int, ...] = ()
    along: Along | None = None  # where each tensor-parallel rank has a part of the sequence


@dataclass(slots=True)
class _Seen:
    """What a run of the whole module shows."""

    calls: list[int] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)  # modules that ran in front of the layers: their results
    after: set[str] = field(default_factory=set)  # that ran behind the first layer, outside of layers
    last: Any = None  # what the latest layer returned


class OwnStage:
    """The layers of one pipeline rank in a module on the meta device."""

    def __init__(
        self,
        module: nn.Module,
        layers: dict[str, nn.Module],
        own: Span,
        result_of: Callable[[Any], Any],
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        """`own` are its layers; where there are none, the number of the next one, and the one before.

        `result_of` is what a loss reads of what the module returns.
        """
        self.module, self.layers, self.own, self.result_of = module, layers, own, result_of
        self.is_first, self.is_last = is_first, is_last  # has what stands in front of the layers, and behind them
        self.count = len(layers)
        self.between = Between()
        self.received: Tensor | None = None
        self.shared: list[tuple[nn.Module, str]] = []  # weights that the first and the last stage have both
        self._kept: set[int] = set()
        self._ran: tuple[str, ...] = ()  # modules outside of the layers that run here, without gradients perhaps
        self._twice: set[int] = set()
        self._gone: list[tuple[nn.Module, str, Tensor]] = []  # weights that do not run here, shapes alone
        self._tables: dict[str, Any] = {}  # modules in front of the layers: their results
        self._stand_in: Any = None
        self._whole = True
        for number, layer in enumerate(layers.values()):
            replace_forward(layer, self._dispatched(number))
        replace_forward(module, self._ended)

    def own_layers(self) -> dict[str, nn.Module]:
        """Those that run here."""
        return {path: layer for n, (path, layer) in enumerate(self.layers.items()) if n in self.own}

    def examine(self, run: Run) -> None:
        """See that stages can be cut, and where; `run` runs the module on its example, shapes alone."""
        seen = _Seen()
        with self._watched(seen):
            run()
        _require_in_order(seen.calls, self.count)
        front = self._read_by(run, Span(0, -1))
        tables = {path for path in seen.before if path not in seen.after}
        behind = self._read_by(run, Span(self.count, self.count), seen.last)
        with self._dummies({path: seen.before[path] for path in tables}):
            alone = self._read_by(run, Span(self.count, self.count), seen.last)
        around = {id(weight) for weight in behind} - {id(weight) for weight in alone}
        if around:
            raise _refused("a value from in front of the layers is read behind them", self._path_of(around))
        self._twice = {id(weight) for weight in front} & {id(weight) for weight in alone}
        self._kept = {id(weight) for weight in (front if self.is_first else ())}
        self._kept |= {id(weight) for weight in (alone if self.is_last else ())}
        self._require_trained_alike(seen, {id(weight) for weight in front}, {id(weight) for weight in alone})
        self._tables = {path: seen.before[path] for path in tables}
        self._ran = (*(seen.before if self.is_first else ()), *(seen.after if self.is_last else ()))

    def _require_trained_alike(self, seen: _Seen, front: set[int], behind: set[int]) -> None:
        """A weight of both ends gets the sum of two gradients: a module that runs without any gives none."""
        for paths, own, other in ((seen.before, front, behind), (seen.after, behind, front)):
            ran = {id(value) for path in paths for value in self.module.get_submodule(path).parameters()}
            if (ran - own) & other:
                raise _refused("a weight of both ends takes gradients at both", self._path_of((ran - own) & other))

    def stop_behind_layers(self) -> None:
        """Where a later stage has no layers, nothing else ends this one; behind the hooks of sharding."""
        if not self.is_last:
            *_, last = self.layers.values()
            last.register_forward_hook(_stop)

    def __call__(self, inputs: dict[str, Any], received: Tensor | None) -> Any:
        """One microbatch: what the next stage gets, or what the module returns."""
        self.received = received if received is None else put_back(received, self.between.along)
        out = self.module(**inputs)
        self.received = None
        if self.is_last:
            return self.result_of(out)
        return part_of(out)

    def _dispatched(self, number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if self._whole:
                    return forward(*args, **kwargs)
                if number > self.own.last:
                    raise _StoppedError(args[0])
                if number < self.own.first:
                    if self.received is not None and not len(self.own) and number == self.own.first - 1:
                        return self.received
                    ends = number == self.count - 1 and self._stand_in is not None
                    return self._stand_in if ends else args[0]
                if number == self.own.first and self.received is not None:
                    args = (self.received, *args[1:])
                return forward(*args, **kwargs)

            return run

        return wrap

    def _ended(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except _StoppedError as stopped:
                return stopped.x

        return run

    @contextmanager
    def _watched(self, seen: _Seen) -> Iterator[None]:
        """Notes the calls of layers, and of modules with weights outside of them."""
        inside = {id(module) for layer in self.layers.values() for module in layer.modules()}
        handles = []
        for number, (path, layer) in enumerate(self.layers.items()):
            handles.append(layer.register_forward_pre_hook(self._entered(seen, number, path), with_kwargs=True))
            handles.append(layer.register_forward_hook(_left(seen, path)))
        for path, module in self.module.named_modules():
            if id(module) not in inside and module._parameters and not list(module.children()):
                handles.append(module.register_forward_hook(_ran(seen, path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, seen: _Seen, number: int, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise _refused("a layer takes the hidden state as its first argument", path)
            if seen.calls and args[0] is not seen.last:
                raise _refused("a layer takes what the layer before it returned, as it is", path)
            rest = (*args[1:], *kwargs.values())
            if any(x.requires_grad for x in tensors_in(rest)):
                raise _refused("beside the hidden state a layer takes what follows from the inputs alone", path)
            found = Between(tuple(part_of(args[0]).shape), along_of(args[0]))
            if not seen.calls:
                self.between = found
            if found != self.between:
                raise _refused("the hidden state has one shape at all layers", path)
            seen.calls.append(number)

        return hook

    def _read_by(self, run: Run, own: Span, result: Any = None) -> list[Tensor]:
        """Weights that the part of the module around these layers depends on."""
        stand_in = None
        if result is not None:
            stand_in = put_back(part_of(result).detach().requires_grad_(), along_of(result))
        with replaced(self, "own", own), replaced(self, "_stand_in", stand_in), replaced(self, "_whole", False):
            return [weight for weight, _ in readers_of(run()) if isinstance(weight, nn.Parameter)]

    @contextmanager
    def _dummies(self, results: dict[str, Any]) -> Iterator[None]:
        kept = [(self.module.get_submodule(path), result) for path, result in results.items()]
        before = [module.forward for module, _ in kept]
        for module, result in kept:
            module.forward = _nothing_like(result)
        try:
            yield
        finally:
            for (module, _), forward in zip(kept, before, strict=True):
                module.forward = forward

    def keep_own(self) -> None:
        """Take away weights that do not run here, and what would read them."""
        self._whole = False
        own = {id(value) for layer in self.own_layers().values() for value in layer.parameters()}
        own |= {id(value) for path in self._ran for value in self.module.get_submodule(path).parameters()}
        inside = {id(module) for layer in self.layers.values() for module in layer.modules()}
        for module in list(self.module.modules()):
            for name, value in list(module._parameters.items()):
                if value is not None and id(value) in self._twice & self._kept:
                    self._twice.remove(id(value))
                    self.shared.append((module, name))
                    continue
                if value is None or id(value) in self._kept | own:
                    continue
                if id(module) not in inside and not (value.is_floating_point() or value.requires_grad):
                    continue  # no gradient shows who reads it
                module._parameters[name] = None
                self._gone.append((module, name, value.detach()))
        if not self.is_first:
            for path, result in self._tables.items():
                self.module.get_submodule(path).forward = _nothing_like(result)

    def stand_in(self, device: torch.device, dtype: torch.dtype) -> None:
        """What code outside of layers asks of weights that are gone, such as their dtype, and one number for all.

        That is none: where it were read, the loss would say so.
        """
        for module, name, weight in self._gone:
            own = dtype if weight.is_floating_point() else weight.dtype
            number = torch.full((), float("nan") if own.is_floating_point else 0, dtype=own, device=device)
            vars(module)[name] = number.expand(weight.shape)

    def _path_of(self, weights: set[int]) -> str:
        """One of them by its path; one of a module that is cut has none now."""
        return next((path for path, value in self.module.named_parameters() if id(value) in weights), "a table")


def layers_of(module: nn.Module, count: int) -> dict[str, nn.Module]:
    """The members of the one outermost list that has as many as the plan has layers."""
    lists = [(path, found) for path, found in outermost_lists(module) if len(found) == count]
    if len(lists) != 1:
        raise PlannerError(
            f"the {count} layers of the plan are the members of one list of the module",
            value=", ".join(f"{path} of {len(found)}" for path, found in outermost_lists(module)) or "no list",
            remedy="keep the layers in one nn.ModuleList, or plan with --fix pp=1",
            key="stages",
        )
    path, found = lists[0]
    return {f"{path}.{number}": layer for number, layer in found.named_children()}


def outermost_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Lists of modules that are in no other list."""
    for name, child in module.named_children():
        path = prefix + name
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield path, child
        else:
            yield from outermost_lists(child, f"{path}.")


def _stop(_: nn.Module, args: Any, out: Any) -> None:
    raise _StoppedError(out)


def _left(seen: _Seen, path: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise _refused("a layer returns one tensor", path)
        seen.last = out

    return hook


def _ran(seen: _Seen, path: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, out: Any) -> None:
        if seen.calls:
            seen.after.add(path)
        else:
            if not isinstance(out, Tensor):
                raise _refused("a module with weights in front of the layers returns one tensor", path)
            seen.before[path] = out

    return hook


def _require_in_order(calls: Sequence[int], count: int) -> None:
    if list(calls) != list(range(count)):
        raise _refused(
            "the layers run once each, in the order of their list", ", ".join(map(str, calls)) or "none"
        )


def _nothing_like(result: Any) -> Callable[..., Any]:
    """A forward that gives numbers that are none: where one were read, the loss would say so."""
    if isinstance(result, Cut):
        local, along = _nothing_like(result.local), result.along
        return lambda *_, **__: Cut.of(local(), along)
    shape, dtype = tuple(result.shape), result.dtype

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        device = next((x.device for x in tensors_in((args, kwargs))), None)
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    return forward


def _refused(rule: str, value: str) -> PlannerError:
    return PlannerError(
        f"in a pipeline {rule}",
        value=value,
        remedy="write the module's forward so, or plan with --fix pp=1",
        key="stages",
    )

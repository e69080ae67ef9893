"""Follows every storage from birth to death: the peak, and what lay in memory then."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.execute.parameters import replaced
from planner.execute.phases import StepPhase, current_phase
from planner.execute.pieces import Piece, piece_of

Part = Literal["parameters", "gradients", "optimizer", "activations", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Bytes allocated at the fullest moment of a step; the parts add up to `bytes`."""

    bytes: int
    phase: StepPhase
    parameters: int
    gradients: int
    optimizer: int
    activations: int  # made by forward, loss or recompute
    other: int  # what backward and the optimizer need in passing


class StorageTracker(TorchDispatchMode):
    """Logs allocation and release of every storage of one fake mode, and to which part each belongs.

    FSDP frees and refills the storage of gathered weights by resizing it, which no dispatch shows: while
    `running`, resizes are seen too.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.log: list[tuple[int, int, StepPhase]] = []  # serial number, change in bytes, when
        self.parts: dict[int, Part] = {}
        self.born: dict[int, StepPhase] = {}
        self._known: dict[int, tuple[int, int]] = {}  # storage → serial number, bytes
        self._borders: list[int] = []  # in the log

    def own(self, tensors: Iterable[Tensor | None], part: Part) -> None:
        """Say what tensors are, now or after they were made."""
        for tensor in tensors:
            serial = self._see(tensor)
            if serial is not None:
                self.parts[serial] = part

    @contextmanager
    def running(self) -> Iterator[None]:
        """Log what happens inside."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            self._refilled(storage)
            return out

        with replaced(torch.UntypedStorage, "resize_", resized), self:
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # a DTensor reasons about shapes with tensors of the whole size: what runs inside it is not looked at
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # each look at a tensor's device comes by
            return out
        made = [self._see(leaf) for leaf in tree_leaves(out)]
        if func.namespace == "fsdp" and "all_gather" in func.__name__:  # the buffer that weights are gathered in
            self.parts.update((serial, "parameters") for serial in made if serial is not None)
        if current_phase() in ("backward", "gradient_sync"):
            self._follow_gradients((args, kwargs), made)
        return out

    def end_piece(self) -> None:
        """What was logged up to here is a piece of its own."""
        self._borders.append(len(self.log))

    def pieces(self) -> list[Piece]:
        """What was logged between one border and the next, the last one's rest included."""
        starts, ends = [0, *self._borders], [*self._borders, len(self.log)]
        return [
            piece_of(change for _, change, _ in self.log[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]

    def peak(self) -> Peak:
        """The fullest moment of what was logged."""
        held = most = moment = 0
        for index, (_, change, _) in enumerate(self.log):
            held += change
            if held > most:
                most, moment = held, index
        live: dict[int, int] = {}
        for serial, change, _ in self.log[: moment + 1]:
            live[serial] = live.get(serial, 0) + change
        sizes: dict[Part, int] = dict.fromkeys(Part.__args__, 0)  # type: ignore[attr-defined]
        for serial, size in live.items():
            sizes[self._part(serial)] += size
        phase = self.log[moment][2] if self.log else "setup"
        return Peak(bytes=most, phase=phase, **sizes)

    def _part(self, serial: int) -> Part:
        made_forward = self.born[serial] in ("forward", "loss", "recompute")
        return self.parts.get(serial, "activations" if made_forward else "other")

    def _see(self, value: Any) -> int | None:
        """The serial number of a tensor's storage, logged when it is new."""
        if isinstance(value, DTensor):
            value = value.to_local()
        if not isinstance(value, FakeTensor) or value.fake_mode is not self.fake_mode:
            return None
        storage = value.untyped_storage()
        if storage._cdata not in self._known:
            self._enter(storage)
            self._resized(storage)
        return self._known[storage._cdata][0]

    def _enter(self, storage: torch.UntypedStorage) -> int:
        serial = len(self.born)
        self.born[serial] = current_phase()
        self._known[storage._cdata] = serial, 0
        weakref.finalize(storage, self._dropped, storage._cdata)
        return serial

    def _refilled(self, storage: torch.UntypedStorage) -> None:
        """A storage that FSDP emptied or filled: it holds gathered weights."""
        if storage._cdata not in self._known:
            self._enter(storage)
        self.parts[self._known[storage._cdata][0]] = "parameters"
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        serial, before = self._known[storage._cdata]
        now = storage.nbytes()
        if now != before:
            self.log.append((serial, now - before, current_phase()))
            self._known[storage._cdata] = serial, now

    def _dropped(self, address: int) -> None:
        serial, size = self._known.pop(address)
        if size:
            self.log.append((serial, -size, current_phase()))

    def _follow_gradients(self, given: Any, made: list[int | None]) -> None:
        """What is made or filled from gradients of parameters is such a gradient too: cast, packed, reduced."""
        inputs = [self._see(leaf) for leaf in tree_leaves(given)]
        if any(serial is not None and self.parts.get(serial) == "gradients" for serial in inputs):
            for serial in (*inputs, *made):
                if serial is not None:
                    self.parts.setdefault(serial, "gradients")


def watch_gradients(module: nn.Module, tracker: StorageTracker) -> list[Any]:
    """Let the tracker know each gradient of a parameter when it comes; returns handles to end this.

    Sharding swaps parameters while it runs, so each forward looks at those of the moment.
    """
    seen: dict[int, Tensor] = {}  # by identity: tensors compare element by element

    def look(owner: nn.Module, _: Any) -> None:
        for parameter in owner._parameters.values():
            if (
                parameter is not None
                and parameter.requires_grad
                and parameter.is_leaf
                and id(parameter) not in seen
            ):
                seen[id(parameter)] = parameter
                parameter.register_post_accumulate_grad_hook(lambda p: tracker.own([p.grad], "gradients"))

    return [part.register_forward_pre_hook(look) for part in module.modules()]

"""What feeds the arguments of a user's own module: which takes tokens, which labels, and what the others hold.

Its example names them, and a run on that, shapes alone, shows what it does with them: how many tokens there are,
whether it returns a loss, and whether that compares scores of a token with the label of that one or of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.cut import tensors_in
from planner.execute.loss import token_loss_sum
from planner.execute.mesh import ALONE
from planner.execute.own_batches import NEXT, dtype_of, loss_in, meta_inputs, nested_in
from planner.execute.own_inputs import Seen, is_constant, seen_by
from planner.execute.own_splits import run_on_example
from planner.models.user_module import Example

SHIFTS = "shifts_labels"  # of a module that says so itself

_TOKENS = ("input_ids", "tokens", "token_ids", "input_tokens", "idx", "ids", "inputs", "input", "x")
_LABELS = ("labels", "label", "targets", "target", "y")
_BESIDE = ("mask", "pos", "type", "segment")  # parts of names of integers that are neither
_ROWS = 2  # of the example: enough to see what differs from row to row
_SCRIPT = "call planner.parallelize(model, plan) in a script of your own, which makes its batches"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The arguments of a module by what fills them."""

    example: Mapping[str, Any]  # of one sequence
    tokens: str = ""  # none: it is no model of language
    labels: str = ""  # none: its loss needs none, or is made of its scores
    shifts: bool = False  # it compares what it says of a token with the label of the next: labels are the tokens
    returns_loss: bool = True
    bounds: Mapping[str, int]  # of integers, as far as they are known
    drawn: tuple[str, ...] = ()  # what is made up where it takes no tokens
    changed: tuple[str, ...] = ()  # buffers that forward writes to

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return min(self.bounds[key] for key in (self.tokens, self.labels, NEXT) if key in self.bounds)


def arguments_of(module: nn.Module, example: Example, length: int) -> Arguments:
    """What a module on the meta device takes, or a PlannerError that says why no data of a run can feed it."""
    given = dict(example(_ROWS, length))
    nested = nested_in(given)
    if nested:
        raise _refused(
            "a module's arguments hold tensors by name, none of them inside of another value",
            nested,
            "give each tensor a name of its own, or " + _SCRIPT,
        )
    shapes = {key: value.shape for key, value in given.items() if isinstance(value, Tensor)}
    for key, shape in shapes.items():
        if shape[:1] != (_ROWS,):
            raise _refused(
                "each tensor among a module's arguments has a row for each sequence",
                f"{key} {list(shape)} for {_ROWS} sequences",
                "let the module keep it as a buffer, or " + _SCRIPT,
            )
    before = {path: (value, value._version) for path, value in module.named_buffers()}  # torch's count of writes
    inputs = meta_inputs(example, _ROWS, length, dtype_of(module))
    seen, out = seen_by(lambda: run_on_example(module, inputs, otherwise=_SCRIPT), inputs, length)
    after = {path: (value, value._version) for path, value in module.named_buffers()}
    tokens, labels = _roles(given, length, seen)
    returns_loss = loss_in(out) is not None
    _require_even(seen)
    bounds = dict(seen.bounds)
    if not returns_loss:
        bounds[NEXT] = _require_scores(out, tokens, labels, length).shape[-1]
    counted = tokens or labels
    if counted and _is_integer(given[counted]):
        _require_bounded(counted, bounds)
    drawn = () if tokens else _drawn_of(given, bounds)
    _require_alike(given, {tokens, labels, *drawn})
    return Arguments(
        example={key: value[:1] if isinstance(value, Tensor) else value for key, value in given.items()},
        tokens=tokens,
        labels=labels,
        shifts=bool(tokens and labels) and _shifts(module, labels, seen, length),
        returns_loss=returns_loss,
        bounds=bounds,
        drawn=drawn,
        changed=tuple(path for path in after if path not in before or not _same(before[path], after[path])),
    )


def next_token_loss(out: Any, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Cross-entropy of a module's scores, for which each token's label is the one after it."""
    labels = batch[NEXT]
    scores = scores_in(out, labels.shape)
    assert scores is not None, "checked on the example"
    return token_loss_sum(scores, labels, scores.shape[-1], ALONE), labels.numel()


def scores_in(out: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The scores [sequences, tokens, vocabulary] among what a module returns: logits by name, or the only such."""
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        out = out["logits"]
    found = [
        x for x in tensors_in(out) if x.is_floating_point() and x.dim() == 3 and tuple(x.shape[:2]) == tuple(shape)
    ]
    return found[0] if len(found) == 1 else None


def _drawn_of(given: Mapping[str, Any], bounds: Mapping[str, int]) -> tuple[str, ...]:
    """Labels, and of fractions and bounded integers those whose example says nothing or differs by sequence.

    One number all over says nothing; what differs along a sequence alone, such as a mask, is meant.
    """
    found = []
    for key, value in given.items():
        if isinstance(value, Tensor) and value.numel():
            known = value.is_floating_point() or key in bounds
            if key in _LABELS or (known and (is_constant(value) or not _alike(value))):
                found.append(key)
    return tuple(found)


def _roles(given: Mapping[str, Any], length: int, seen: Seen) -> tuple[str, str]:
    """The names of tokens and of labels, empty where there are none."""
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    fitting = [
        key for key, value in tensors.items() if _is_integer(value) and tuple(value.shape) == (_ROWS, length)
    ]
    compared = seen.classes - seen.looked_up - set(_TOKENS)
    labels = [key for key in tensors if key in compared or key in _LABELS]
    others = [key for key in fitting if key not in labels and not any(part in key for part in _BESIDE)]
    tokens = [key for key in others if key in _TOKENS] or others
    if len(labels) > 1 or len(others) > 1:
        raise _refused(
            "of a module's integers one takes tokens, at most one labels, others a mask, positions or types",
            ", ".join(labels if len(labels) > 1 else others),
            f"call them {_TOKENS[0]} and {_LABELS[0]}, the others …_mask, position… or …_type_…; or {_SCRIPT}",
        )
    if tokens and labels and labels[0] not in fitting:
        raise _refused(
            "a module that takes tokens takes a label for each of them, or none",
            f"{labels[0]} {list(given[labels[0]].shape)} beside {tokens[0]} {list(given[tokens[0]].shape)}",
            _SCRIPT,
        )
    return tokens[0] if tokens else "", labels[0] if labels else ""


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


def _require_scores(out: Any, tokens: str, labels: str, length: int) -> Tensor:
    scores = scores_in(out, (_ROWS, length)) if tokens and not labels else None
    if scores is None:
        told = f"{type(out).__name__} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise _refused(
            "a module that is trained returns its loss, one number, or takes tokens alone and returns its scores, "
            "[sequences, tokens, vocabulary]",
            told,
            "give it labels in its example and let it return the loss; or " + _SCRIPT + ", with a loss_fn",
        )
    return scores


def _require_bounded(key: str, bounds: Mapping[str, int]) -> None:
    if key not in bounds:
        raise _refused(
            "how many different tokens or labels there may be shows where they choose rows of a table, or classes "
            "of a loss",
            key,
            "look them up with nn.Embedding, compare them by F.cross_entropy; or " + _SCRIPT,
        )


def _require_even(seen: Seen) -> None:
    """Means of several ranks and microbatches are put together by how many labels each has."""
    if seen.uneven:
        raise _refused(
            "in the mean that a module returns for its loss all labels count alike",
            ", ".join(sorted(seen.uneven)),
            "let labels that do not count be negative: no data of a run has them; or "
            + _SCRIPT
            + ", with a loss_fn",
        )


def _require_alike(given: Mapping[str, Any], fed: set[str]) -> None:
    """What no data feeds is as the example has it, so it must not depend on the sequence."""
    for key, value in given.items():
        if key not in fed and isinstance(value, Tensor) and not _alike(value):
            raise _refused("an argument beside tokens and labels is the same for every sequence", key, _SCRIPT)


def _shifts(module: nn.Module, labels: str, seen: Seen, length: int) -> bool:
    """Whether labels are the tokens, and the module itself compares each with what it says of the one before."""
    said = getattr(module, SHIFTS, None)
    ahead = seen.ahead(labels, (_ROWS, length)) if not isinstance(said, bool) else int(said)
    if ahead not in (0, 1):
        raise _refused(
            "a module's loss shows whether it compares the scores of a token with that one's label or the next's",
            labels,
            f"set {SHIFTS} of the module: True where labels are the tokens and it shifts them, False where a "
            "token's label is the next one; or " + _SCRIPT,
        )
    return ahead == 1


def _alike(value: Tensor) -> bool:
    return bool((value == value[:1]).all())


def _same(before: tuple[Tensor, int], after: tuple[Tensor, int]) -> bool:
    return before[0] is after[0] and before[1] == after[1]


def _refused(rule: str, value: str, remedy: str) -> PlannerError:
    return PlannerError(rule, value=value, remedy=remedy, key="model")

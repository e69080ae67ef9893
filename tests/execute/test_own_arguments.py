"""What feeds a user's own module is seen on its example, and what cannot be told is refused, not guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.own_arguments import Arguments, arguments_of, scores_in
from planner.models.user_module import Example

VOCAB, LENGTH = 11, 6


class Scores(nn.Module):
    """What it returns is up to `after`, which is given scores, tokens and everything else."""

    def __init__(self, after: Callable[..., Any]) -> None:
        super().__init__()
        self.table, self.out, self.after = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB), after

    def forward(self, **given: Any) -> Any:
        tokens = next(iter(given.values()))
        return self.after(self.out(self.table(tokens)), *given.values())


def seen(after: Callable[..., Any], example: Example | None = None, *names: str, **attributes: Any) -> Arguments:
    def usual(batch: int, length: int) -> dict[str, Tensor]:
        return {name: torch.zeros(batch, length, dtype=torch.long) for name in names or ("tokens", "labels")}

    with torch.device("meta"):
        module = Scores(after)
    for name, value in attributes.items():
        setattr(module, name, value)
    return arguments_of(module, example or usual, LENGTH)


def refused(*args: Any, **attributes: Any) -> str:
    with pytest.raises(PlannerError) as caught:
        seen(*args, **attributes)
    assert "planner.parallelize" in caught.value.remedy
    return f"{caught.value.rule}: {caught.value.value}"


def compared(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.reshape(-1))


LOSSES: dict[str, tuple[bool, Callable[..., Any]]] = {
    "next tokens": (False, lambda x, _, y: compared(x, y)),
    "next tokens, but the last": (False, lambda x, _, y: compared(x[:, :-1], y[:, :-1])),
    "next tokens, but the first": (False, lambda x, _, y: compared(x[:, 1:], y[:, 1:])),
    "classes in front of the sequence": (False, lambda x, _, y: F.cross_entropy(x.transpose(1, 2), y)),
    "gathered": (False, lambda x, _, y: -x.log_softmax(-1).gather(-1, y[..., None]).mean()),
    "shifts both": (True, lambda x, _, y: compared(x[..., :-1, :], y[..., 1:].contiguous())),
    "shifts labels and fills up": (True, lambda x, _, y: compared(x, F.pad(y, (0, 1), value=-100)[..., 1:])),
    "rolls labels": (True, lambda x, _, y: compared(x, y.roll(-1, 1))),
    "narrows both": (
        True,
        lambda x, _, y: compared(x.narrow(1, 0, LENGTH - 1), y.to(torch.int32).long().narrow(1, 1, LENGTH - 1)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_whether_a_module_shifts_its_labels_is_seen(name: str) -> None:
    shifts, loss = LOSSES[name]
    found = seen(loss)
    assert (found.tokens, found.labels, found.shifts, found.returns_loss) == ("tokens", "labels", shifts, True)
    assert found.vocab == VOCAB


def test_a_shift_that_is_not_seen_is_told_or_refused() -> None:
    """Where labels go by values; where scores lose their first and their last; two ahead; ahead and not."""

    def by_values(x: Tensor, _: Tensor, y: Tensor) -> Tensor:
        return compared(x, torch.nonzero_static(y, size=LENGTH)[:, :1].expand(-1, 2))

    def mixed(x: Tensor, _: Tensor, y: Tensor) -> Tensor:
        first, last = x[:, :-1], x[:, 1:]
        return compared(first + last, y[:, 1:])

    def two_ahead(x: Tensor, _: Tensor, y: Tensor) -> Tensor:
        return compared(x, F.pad(y, (0, 2))[:, 2:])

    def two_losses(x: Tensor, _: Tensor, y: Tensor) -> Tensor:
        return compared(x, y) + compared(x[:, :-1], y[:, 1:])

    for loss in (by_values, mixed, two_ahead, two_losses):
        assert "whether it compares" in refused(loss, lambda b, n: {"tokens": zeros(b, n), "labels": zeros(b, n)})
        assert seen(loss, shifts_labels=True).shifts
        assert not seen(loss, shifts_labels=False).shifts


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def test_roles_are_told_by_name_and_use() -> None:
    loss = LOSSES["next tokens"][1]
    assert seen(loss, None, "x", "gold").labels == "gold", "its loss compares scores with it"
    alone = seen(lambda x, _: x, None, "anything")
    assert (alone.tokens, alone.labels, alone.returns_loss, alone.vocab) == ("anything", "", False, VOCAB)
    own = seen(lambda x, y: compared(x[:, :-1], y[:, 1:]), None, "input_ids")
    assert (own.tokens, own.labels, own.returns_loss, own.shifts) == ("input_ids", "", True, False)
    masked = seen(lambda x, _, mask, y: compared(x * mask[..., None], y), None, "idx", "mask", "targets")
    assert (masked.tokens, masked.labels, list(masked.example)) == ("idx", "targets", ["idx", "mask", "targets"])


def test_what_no_data_can_feed_is_refused() -> None:
    loss = LOSSES["next tokens"][1]
    said = refused(lambda x, *_: x.sum(), None, "input_ids", "decoder_input_ids")
    assert said.endswith("others a mask, positions or types: input_ids, decoder_input_ids")
    said = refused(
        lambda x, _, y: F.cross_entropy(x[:, 0], y), lambda b, n: {"tokens": zeros(b, n), "label": zeros(b)}
    )
    assert said.endswith("label for each of them, or none: label [2] beside tokens [2, 6]")
    said = refused(loss, lambda b, n: {"tokens": zeros(b, n), "labels": zeros(b, n), "scale": torch.ones(n)})
    assert said.endswith("a row for each sequence: scale [6] for 2 sequences")
    said = refused(
        lambda x, _, bias, y: compared(x + bias[..., None], y),
        lambda b, n: {"tokens": zeros(b, n), "bias": torch.arange(1.0 * b * n).view(b, n), "labels": zeros(b, n)},
    )
    assert said == "an argument beside tokens and labels is the same for every sequence: bias"
    nested = {"more": {"labels": zeros(2, LENGTH)}}
    said = refused(loss, lambda b, n: {"tokens": zeros(b, n), **nested})
    assert said.endswith("none of them inside of another value: more: dict")
    assert "returns its scores" in refused(lambda x, _: x[:, -1:], None, "tokens")
    assert "returns its scores" in refused(lambda x, *_: x, None, "tokens", "labels")


class Fitted(nn.Module):
    """What takes no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 1)

    def forward(self, features: Tensor, mask: Tensor, goal: Tensor) -> Tensor:
        return ((self.out(features)[..., 0] - goal) * mask).square().mean()


@pytest.mark.parametrize("make", [torch.zeros, torch.randn])
def test_what_differs_by_sequence_or_says_nothing_is_made_up(make: Callable[..., Tensor]) -> None:
    def example(batch: int, length: int) -> dict[str, Tensor]:
        mask = torch.ones(batch, length)
        mask[:, 0] = 0.0
        return {"features": make(batch, length, 3), "mask": mask, "goal": make(batch, length)}

    with torch.device("meta"):
        module = Fitted()
    assert arguments_of(module, example, LENGTH).drawn == ("features", "goal")


def test_labels_that_count_less_than_others_are_refused() -> None:
    """Several ranks and microbatches would weigh their means by how many labels they have."""

    def loss(**keys: Any) -> Callable[..., Any]:
        return lambda x, _, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), **keys)

    rule = "in the mean that a module returns for its loss all labels count alike: "
    assert refused(loss(ignore_index=VOCAB - 1)) == f"{rule}ignore_index {VOCAB - 1}"
    assert refused(loss(weight=torch.ones(VOCAB, device="meta"))) == rule + "a weight for each class"
    for ignored in (-1, VOCAB):
        assert seen(loss(ignore_index=ignored)).returns_loss


def test_scores_are_logits_by_name_or_the_only_ones() -> None:
    scores, state = torch.zeros(2, 3, 7), torch.zeros(2, 3, 4)
    assert scores_in((scores, None, torch.zeros(2)), (2, 3)) is scores
    assert scores_in({"hidden": state, "logits": scores}, (2, 3)) is scores
    assert scores_in((scores, state), (2, 3)) is None

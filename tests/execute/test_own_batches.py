"""A batch and the module that takes it: what its forward does not take is for the loss alone."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from planner.execute.own_batches import with_its_arguments


class Taking(nn.Module):
    def forward(self, tokens: int, mask: int = 0) -> tuple[int, int]:
        return tokens, mask


class TakingAll(nn.Module):
    def forward(self, **given: Any) -> dict[str, Any]:
        return given


def test_a_forward_is_given_its_own_arguments() -> None:
    forward = with_its_arguments(Taking().forward)
    assert forward(tokens=1, labels=2) == (1, 0)
    assert forward(1, mask=3, labels=2) == (1, 3)
    with pytest.raises(TypeError, match="tokens"):
        forward(labels=2)
    taken = with_its_arguments(TakingAll().forward)(tokens=1, labels=2, next_tokens=3)
    assert taken == {"tokens": 1, "labels": 2}, "what is ours it is not given"

"""Rules for tensors of which each rank holds a part: the part of a result is the result of the part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planner.execute.cut import Along, Cut, RefusedError, Source
from planner.execute.mesh import Peers

RANKS = 2
PLAIN = torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHT = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8)
MASK = torch.ones(6, 6, dtype=torch.bool).tril()
PER_HEAD = torch.linspace(0, 1, 4, dtype=torch.float64)


def part(x: Tensor, dim: int, rank: int, parts: tuple[int, ...] = ()) -> Cut:
    """What a rank holds of a tensor."""
    along = Along(dim, x.shape[dim], Peers(None, rank, RANKS), parts)
    return Cut.of(along.own(x, dim), along)


# of [batch, length, heads, depth] cut by heads
HEADS: dict[str, Callable[[Tensor], Any]] = {
    "numbers": lambda x: (2 - x) ** 2 / 3 + x.exp(),
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "a weight of each head": lambda x: x * PER_HEAD[:, None] + PER_HEAD.view(1, 1, 4, 1),
    "a weight of all": lambda x: x * WEIGHT[0],
    "casts": lambda x: x.float().type_as(x).to(torch.float32).double().contiguous().cpu(),
    "whole numbers": lambda x: x.int() + (2 * x).long() + x.bool() + x.type(torch.int8),
    "softmax": lambda x: x.softmax(-1) + F.log_softmax(x, dim=1),
    "reductions": lambda x: x.mean(-1, keepdim=True) + x.sum(1).unsqueeze(1) + x.norm(2, -1, True),
    "fewer dims": lambda x: x.amax((0, 3)),
    "norms": lambda x: F.layer_norm(x, (8,), WEIGHT[0], WEIGHT[1]) + F.rms_norm(x, (8,), WEIGHT[2]),
    "a projection of each head": lambda x: F.linear(x, WEIGHT),
    "halves turned": lambda x: torch.cat((-x[..., 4:], x[..., :4]), dim=-1),
    "pairs turned": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(3),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(2, 6, 4, 4, 2)) * 1j).flatten(3),
    "heads in front": lambda x: x.permute(0, 2, 1, 3).movedim(1, 2).swapaxes(0, 1).transpose(0, 1).mT,
    "heads behind one another": lambda x: x.flatten(2),
    "and back": lambda x: x.reshape(2, 6, -1).unflatten(-1, (4, 8)).view(12, 4, 8).view(2, 6, 4, 8),
    "apart": lambda x: x.view(2, 6, 2, 2, 8),
    "copies of heads": lambda x: x[:, :, :, None].expand(2, 6, 4, 3, 8).reshape(2, 6, 12, 8),
    "copies in a row": lambda x: x.repeat_interleave(3, dim=2),
    "pieces of the others": lambda x: x.split([2, 4], 1)[1] + x.chunk(3, 1)[0].repeat_interleave(2, 1),
    "one of the others": lambda x: x[:, 0] + x.select(1, 3) + x.unbind(1)[2] + x.narrow(1, 2, 1).squeeze(1),
    "iterated": lambda x: list(x)[1],
    "scores": lambda x: (x.transpose(1, 2) @ x.permute(0, 2, 3, 1)).masked_fill(~MASK, -1e9).softmax(-1),
    "scores by letters": lambda x: torch.einsum("bqhd,bkhd->bhqk", x, x),
    "letters of a whole": lambda x: torch.einsum("bqhd,h,de->behq", x, PER_HEAD, WEIGHT.T),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, attn_mask=MASK),
    "a mask of each head": lambda x: F.scaled_dot_product_attention(
        *[x.transpose(1, 2)] * 3, attn_mask=PER_HEAD.view(4, 1, 1).expand(4, 6, 6)
    ),
    "grouped": lambda x: F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (x.repeat_interleave(2, 2), x, x)), enable_gqa=True
    ),
    "triangles": lambda x: x.tril() if x.dim() == 5 else x.transpose(1, 2).triu(),
    "chosen": lambda x: torch.where(x > 0, x, 0.0) + F.glu(x, 1).repeat_interleave(2, 1),
    "zeros": lambda x: torch.zeros_like(x) + x.new_ones(8),
    "no dropout": lambda x: F.dropout(x, 0.5, training=False),
}  # fmt: skip

WIDE = PLAIN.flatten(2)  # [batch, length, 32]

# of [batch, length, heads, depth], two ranks to each of two heads
COPIED: dict[str, Callable[[Tensor], Any]] = {
    "numbers": lambda x: (x * WEIGHT[0] + 2 * x).softmax(-1) * PER_HEAD[:2, None],
    "products": lambda x: x.transpose(1, 2) @ x.permute(0, 2, 3, 1),
    "letters": lambda x: torch.einsum("bqhd,bkhd->bhqk", x, x),
    "expanded": lambda x: x[:, :, :, None].expand(2, 6, 2, 6, 8).reshape(2, 6, 12, 8),
    "expanded in front": lambda x: x.transpose(1, 2)[:, :, None].expand(2, 2, 4, 6, 8).flatten(1, 2),
    "in a row": lambda x: x.repeat_interleave(4, dim=2),
    "features": lambda x: x.flatten(2),
    "grouped": lambda x: F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (x.repeat_interleave(4, 2), x, x)), enable_gqa=True
    ),
}  # fmt: skip

ONE_HEAD: dict[str, Callable[[Tensor], Any]] = {
    "numbers": lambda x: x * WEIGHT[0] + 1,
    "grown": lambda x: x.expand(2, 6, 8, 8) * 2,
    "grown in front": lambda x: x.transpose(1, 2).expand(-1, 4, -1, -1),
    "expanded": lambda x: x[:, :, :, None].expand(2, 6, 1, 8, 8).reshape(2, 6, 8, 8),
    "in a row": lambda x: x.repeat_interleave(4, 2),
    "grouped": lambda x: F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (x.repeat_interleave(8, 2), x, x)), enable_gqa=True
    ),
}  # fmt: skip

# of [batch, length, features], what fuses pieces of 16, 8 and 8 features
FUSED: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda x: x.split((16, 8, 8), dim=-1)[1],
    "slices": lambda x: x[..., 16:24] * x[:, :, 24:],
    "the first two": lambda x: F.silu(x)[..., :24].split([16, 8], -1)[0],
    "heads of all": lambda x: x.view(2, 6, 8, 4).split((4, 2, 2), dim=2)[2].flatten(2),
}
EQUAL: dict[str, Callable[[Tensor], Any]] = {
    "chunks": lambda x: x.chunk(2, -1)[1],
    "a dim of two": lambda x: x.view(2, 6, 2, 4, 4).permute(2, 0, 3, 1, 4)[1],
}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "over heads": lambda x: x.sum(2),
    "over all": lambda x: x.mean(),
    "the largest": lambda x: x.max(),
    "one head": lambda x: x[:, :, 1],
    "half the heads": lambda x: x[:, :, :2],
    "heads joined": lambda x: torch.cat((x, x), 2),
    "heads summed": lambda x: torch.einsum("bqhd,h->bqd", x, PER_HEAD),
    "features summed": lambda x: F.linear(x.flatten(2), torch.ones(3, 32, dtype=x.dtype)),
    "heads multiplied": lambda x: x @ torch.ones(8, 4, dtype=x.dtype) @ x,
    "other heads": lambda x: x.roll(1, 2),
    "two cuts": lambda x: x.flatten(2) + x.flatten(2).transpose(1, 2).reshape(2, 6, 32),
    "across": lambda x: x.view(2, 24, 8),
    "over all, by a flag": lambda x: x.std(False),
    "over all, by no dim": lambda x: x.sum(dim=()),
    "into a buffer": lambda x: torch.cat((x, x), 1, out=torch.empty(2, 12, 4, 8, dtype=x.dtype)),
    "by a flag": lambda x: x[True],
    "by a tensor": lambda x: x[:, torch.tensor([0, 1])],
    "written into": lambda x: x.__setitem__(0, 1.0),
    "a whole changed": lambda x: torch.zeros(2, 6, 4, 8, dtype=torch.float64).add_(x),
    "every second": lambda x: x[:, :, ::2],
}  # fmt: skip
REFUSED_COPIES: dict[str, Callable[[Tensor], Any]] = {
    "queries": lambda x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3),
    "what ranks cannot share": lambda x: x.repeat_interleave(3, 2) + x.repeat_interleave(6, 2)[:, :, :6],
    "one head": lambda x: x[:, :, 1],
    "over heads": lambda x: x.sum(2),
}  # fmt: skip


def check(function: Callable[[Tensor], Any], whole: Tensor, dim: int, parts: tuple[int, ...] = ()) -> None:
    wanted = function(whole)
    for rank in range(RANKS):
        found = function(part(whole, dim, rank, parts))
        assert isinstance(found, Cut)
        assert tuple(found.shape) == found.size() == wanted.shape
        torch.testing.assert_close(found.local, found.along.own(wanted, found.along.dim))


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str) -> None:
    check(HEADS[case], PLAIN, 2)


@pytest.mark.parametrize("case", COPIED)
def test_copies(case: str) -> None:
    check_copies(COPIED[case], PLAIN[:, :, :2])


@pytest.mark.parametrize("case", ONE_HEAD)
def test_copies_of_the_one_head(case: str) -> None:
    check_copies(ONE_HEAD[case], PLAIN[:, :, :1])


def check_copies(function: Callable[[Tensor], Any], whole: Tensor) -> None:
    """A part of the result is that of the result, and the gradients of copies add up to the whole's."""
    heads = whole.shape[2]
    whole = whole.clone().requires_grad_()
    wanted = function(whole)
    gradient = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).view(wanted.shape)
    wanted.backward(gradient)
    summed = torch.zeros_like(whole)
    for rank in range(4):
        along = Along(2, heads, Peers(None, rank, 4), copies=4 // heads)
        own = along.own(whole.detach(), 2).requires_grad_()
        found = function(Cut.of(own, along))
        assert tuple(found.shape) == wanted.shape
        torch.testing.assert_close(found.local, found.along.own(wanted.detach(), found.along.dim))
        found.local.backward(found.along.own(gradient, found.along.dim) / found.along.copies)
        assert own.grad is not None
        summed[:, :, along.number] += own.grad[:, :, 0]
    torch.testing.assert_close(summed, whole.grad)


@pytest.mark.parametrize("case", REFUSED_COPIES)
def test_what_copies_cannot_do_is_refused(case: str) -> None:
    with pytest.raises(RefusedError):
        REFUSED_COPIES[case](Cut.of(PLAIN[:, :, :1], Along(2, 2, Peers(None, 0, 4), copies=2)))


@pytest.mark.parametrize("case", FUSED)
def test_fused(case: str) -> None:
    check(FUSED[case], WIDE, 2, (16, 8, 8))


@pytest.mark.parametrize("case", EQUAL)
def test_equal_pieces(case: str) -> None:
    check(EQUAL[case], WIDE, 2, (16, 16))


NUMBERS: tuple[Callable[[Tensor], Any], ...] = (float, int, bool, Tensor.item, Tensor.tolist, Tensor.numpy)


@pytest.mark.parametrize("read", NUMBERS)
def test_numbers_are_not_read_from_a_part(read: Callable[[Tensor], Any]) -> None:
    """Nor from one that has a single element, as here."""
    with pytest.raises(RefusedError, match="numbers outside of tensors"):
        read(part(torch.ones(RANKS), 0, 0))


def test_the_type_of_a_part_is_that_of_the_whole() -> None:
    assert part(PLAIN, 2, 0).type() == PLAIN.type()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with pytest.raises(RefusedError):
        REFUSED[case](part(PLAIN, 2, 0))


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (FUSED["split"], (16, 8, 8)),
        (FUSED["slices"], (16, 8, 8)),
        (FUSED["heads of all"], (16, 8, 8)),
        (EQUAL["chunks"], (16, 16)),
        (lambda x: x.view(2, 6, 3, 2, 16), (32, 32, 32)),  # three, which two ranks cannot share
        (lambda x: x.view(2, 6, 4, -1), ()),
    ],
)
def test_what_a_layer_fuses_is_seen_where_it_is_taken_apart(
    function: Callable[[Tensor], Any], parts: tuple[int, ...]
) -> None:
    size = sum(parts) or 32
    source = Source("layer", size)
    with torch.device("meta"):
        function(Cut.of(torch.empty(2, 6, size // RANKS), Along(2, size, Peers(None, 0, RANKS), source=source)))
    assert source.parts() == parts


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.unbind(2),
        lambda x: x.permute(2, 0, 3, 1, 4)[1],
        lambda x: x[..., None, 0, :, :],
        lambda x: x.select(2, -1),
        lambda x: list(x.movedim(2, 0)),
    ],
)
def test_a_dim_that_is_taken_apart_one_by_one_is_none_of_heads(function: Callable[[Tensor], Any]) -> None:
    """Four heads of keys and values: two ranks could have shared the dim of two. The second run cuts heads."""
    source = Source("layer", 32)

    def run() -> Any:
        with torch.device("meta"):
            along = Along(2, 32, Peers(None, 0, RANKS), source=source)
            return function(Cut.of(torch.empty(2, 6, 16), along).view(2, 6, 2, 4, 4))

    first = run()
    assert source.fused == {16}
    again = run()
    assert source.parts() == (16, 16)
    for before, one in zip(*((x if isinstance(x, (tuple, list)) else (x,)) for x in (first, again)), strict=True):
        assert one.whole_shape == before.shape
        assert one.whole_shape[one.along.dim] == 4

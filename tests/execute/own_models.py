"""Models as users write them, for plans that cut them: each function returns (module, example)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 48

Made = tuple[nn.Module, Callable[[int, int], dict[str, Tensor]]]


class FusedAttention(nn.Module):
    """One layer gives queries, keys and values; widths come from the input's shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Layer(nn.Module):
    """Norms before attention and before a feed-forward of two layers."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """Learned positions, one table for both ends, its own loss."""

    def __init__(self, attention: Callable[[int, int], nn.Module], width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(256, width)
        self.h = nn.ModuleList(Layer(width, attention(width, heads)) for _ in range(4))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


class Rms(nn.Module):
    """A norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class RmsInSingle(Rms):
    """The same, its weight cast each time: in fp32 the cast gives the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        own = x.float()
        return (own * torch.rsqrt(own.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight.float()).to(x.dtype)


class Grouped(nn.Module):
    """Grouped keys, norms of heads, rotary positions that the model computes once."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.depth = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.depth, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.depth, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = Rms(self.depth), Rms(self.depth)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        b, s, _ = x.shape
        q = turned(self.q_norm(self.wq(x).view(b, s, self.heads, self.depth)), *angles)
        k = turned(self.k_norm(self.wk(x).view(b, s, self.kv_heads, self.depth)), *angles)
        v = self.wv(x).view(b, s, self.kv_heads, self.depth)
        times = self.heads // self.kv_heads
        k = (
            k[:, :, :, None, :]
            .expand(b, s, self.kv_heads, times, self.depth)
            .reshape(b, s, self.heads, self.depth)
        )
        v = v.repeat_interleave(times, dim=2)
        scores = torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) / self.depth**0.5
        hidden = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.wo(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [batch, length, heads, depth]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Gated(nn.Module):
    """Gate and value from one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 6 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class GroupedLayer(nn.Module):
    """Takes angles beside the hidden state; its scales are no module's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList((Rms(width), Rms(width)))
        self.attention, self.ffn = Grouped(width, 4, 2), Gated(width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norms[0](x), angles) * self.scale
        return x + self.ffn(self.norms[1](x))


class Llama(nn.Module):
    """Returns its scores."""

    def __init__(self, width: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(GroupedLayer(width) for _ in range(layers))
        self.norm, self.out = Rms(width), nn.Linear(width, VOCAB, bias=False)
        self.depth = width // 4

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        place = torch.arange(tokens.shape[1], device=tokens.device).to(x.dtype)
        turns = place[:, None] * 0.3 ** torch.arange(self.depth // 2, device=tokens.device).to(x.dtype)
        angles = turns.cos(), turns.sin()
        for layer in self.layers:
            x = layer(x, angles)
        return self.out(self.norm(x)).float() if x.dtype == torch.bfloat16 else self.out(self.norm(x))


class LiteralAttention(nn.Module):
    """Four heads, which stand in the code alone; queries, keys and values by a view."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1))


class PairedAttention(nn.Module):
    """Keys and values from one layer, as many as ranks, and taken apart one by one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.both, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q = self.query(x).view(b, s, self.heads, -1).transpose(1, 2)
        both = self.both(x).view(b, s, 2, self.heads, width // self.heads)
        k, v = both.permute(2, 0, 3, 1, 4)
        v = v + both[:, :, 0, :].transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1))


class PairedGroups(nn.Module):
    """Two heads of keys and two of values from one layer, each for some of the queries."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.both = nn.Linear(width, 4 * (width // heads))

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q = self.query(x).view(b, s, self.heads, -1).transpose(1, 2)
        k, v = self.both(x).view(b, s, 2, 2, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(b, s, -1))


class SharedShift(nn.Module):
    """Queries moved by what all heads share: one gradient for both summands."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.shift = nn.Linear(width, width // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.value))
        q = torch.tanh(q + self.shift(x)[:, :, None])
        q.register_hook(lambda gradient: gradient * torch.arange(1, self.heads + 1, device=x.device)[:, None])
        return self.out((q * v).flatten(2))


class InSingle(Grouped):
    """Norms of heads that compute in fp32, whatever the dtype of a step."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__(width, heads, kv_heads)
        self.q_norm, self.k_norm = RmsInSingle(self.depth), RmsInSingle(self.depth)


class Perceptrons(nn.Module):
    """Numbers in, numbers out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(inplace=True), nn.Linear(4 * width, width))
            for _ in range(4)
        )
        self.last = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Rolling(nn.Module):
    """Features moved across heads, which no part can do alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).roll(1, -1))


class Straight(torch.autograd.Function):
    """A gradient of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Rounding(Rolling):
    """A custom function between the splits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(Straight.apply(self.up(x)))


class Borrowing(Gpt):
    """Reads the table's weight itself."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return F.cross_entropy((self.ln_f(x) @ self.wte.weight.T).flatten(0, 1), labels.flatten())


class LargeEnds(nn.Module):
    """A table and a head of its own that are most of the weights, and a loss over many words."""

    def __init__(self, vocab: int = 16_384, width: int = 256) -> None:
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.h = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(3)
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in self.h:
            x = x + block(x)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())


class Unlearning(Gpt):
    """Its table takes gradients from the scores alone."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())


class Asking(Gpt):
    """Asks weights of theirs for a dtype, trains no table, and looks places up without gradients."""

    def __init__(self) -> None:
        super().__init__(FusedAttention)
        self.wte.weight.requires_grad_(False)
        self.places = nn.Parameter(torch.arange(256).flip(0), requires_grad=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens.to(self.wte.weight.device))
        with torch.no_grad():
            places = self.wpe(self.places[: tokens.shape[1]])
        x = (x + places).to(self.h[0].ln_1.weight.dtype)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x).to(self.wte.weight.dtype))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Backward(Gpt):
    """Its layers run from the last to the first."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(tokens)
        for block in reversed(self.h):
            x = block(x)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), labels.flatten())


class Around(Gpt):
    """What stands in front of the layers is read behind them too."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        first = x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(x + first).flatten(0, 1), labels.flatten())


class Pair(Gpt):
    """Returns scores beside its loss; labels that do not count are others than usual, and layers drop."""

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        places = self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(self.wte(tokens) + places, 0.1, self.training)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        given = labels.masked_fill(labels == -100, -1)
        return logits, F.cross_entropy(logits.flatten(0, 1), given.view(-1), ignore_index=-1)


class Deciding(Gpt):
    """What it does depends on values."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return super().forward(tokens if bool((tokens > 0).any()) else labels, labels)


class Summing(Gpt):
    """Its loss is a sum, which several ranks and microbatches take for a mean."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return super().forward(tokens, labels) * tokens.numel()


class Encoder(nn.Module):
    """Layers of torch's own, whose attention has its products in one module."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        kind = {"dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **kind) for _ in range(2))
        self.out = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())


class Shifting(Llama):
    """Compares scores with the labels of next tokens itself, returns both by name, and is given a mask and places.

    Its table of places is no buffer, just a tensor.
    """

    def __init__(self, width: int = 16, layers: int = 4) -> None:
        super().__init__(width, layers)
        self.places = torch.sin(0.3 * torch.arange(64 * width).view(64, width))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        x = x + self.places.to(input_ids.device, x.dtype)[position_ids] * attention_mask[..., None]
        angles = (torch.ones(input_ids.shape[1], self.depth // 2, dtype=x.dtype, device=x.device),) * 2
        for layer in self.layers:
            x = layer(x, angles)
        logits = self.out(self.norm(x))
        shifted = labels[..., 1:].contiguous().view(-1)
        return {"logits": logits, "loss": F.cross_entropy(logits[..., :-1, :].flatten(0, 1), shifted)}


class Normed(nn.Module):
    """Images and classes; its norm keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, pixels: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
        x = self.norm(self.first(pixels)).relu().mean(-1)
        return F.cross_entropy(self.last(x * scale), classes)


def tokens_and_labels(batch: int, length: int) -> dict[str, Tensor]:
    """Zeros."""
    tokens = torch.zeros(batch, length, dtype=torch.long)
    return {"tokens": tokens, "labels": torch.zeros_like(tokens)}


def gpt() -> Made:
    return Gpt(FusedAttention), tokens_and_labels


def literal() -> Made:
    return Gpt(LiteralAttention), tokens_and_labels


def paired() -> Made:
    return Gpt(PairedAttention), tokens_and_labels


def paired_groups() -> Made:
    return Gpt(PairedGroups, width=32, heads=4), tokens_and_labels


def paired_thirds() -> Made:
    return Gpt(PairedAttention, width=24, heads=3), tokens_and_labels


def llama() -> tuple[Llama, Callable[[int, int], dict[str, Tensor]]]:
    return Llama(), lambda batch, length: {"tokens": torch.zeros(batch, length, dtype=torch.long)}


def encoder() -> Made:
    return Encoder(), tokens_and_labels


def shifting() -> Made:
    def example(batch: int, length: int) -> dict[str, Tensor]:
        tokens = torch.zeros(batch, length, dtype=torch.long)
        places = torch.arange(length).expand(batch, length)
        beside = {"attention_mask": torch.ones_like(tokens), "position_ids": places}
        return {"input_ids": tokens, **beside, "labels": torch.zeros_like(tokens)}

    return Shifting(), example


def normed() -> Made:
    def example(batch: int, length: int) -> dict[str, Tensor]:
        places = torch.arange(8.0).expand(batch, 8)
        return {"pixels": torch.zeros(batch, 3, length), "classes": torch.zeros(batch).long(), "scale": places}

    return Normed(), example


def perceptrons() -> Made:
    return Perceptrons(), lambda batch, length: {"x": torch.zeros(batch, length, 6)}


def shared_shift() -> Made:
    return Gpt(SharedShift, heads=2), tokens_and_labels


def in_single() -> Made:
    model, example = llama()
    for layer in model.layers:
        layer.attention = InSingle(16, 4, 2)
    return model, example


def one_head() -> Made:
    model, example = llama()
    for layer in model.layers:
        layer.attention = Grouped(16, 4, 1)
    return model, example


def rolling() -> Made:
    return Gpt(Rolling), tokens_and_labels


def rounding() -> Made:
    return Gpt(Rounding), tokens_and_labels


def borrowing() -> Made:
    return Borrowing(FusedAttention), tokens_and_labels


def three_heads() -> Made:
    return Gpt(FusedAttention, width=24, heads=3), tokens_and_labels


def large_ends() -> Made:
    return LargeEnds(), tokens_and_labels


def unlearning() -> Made:
    return Unlearning(FusedAttention), tokens_and_labels


def asking() -> Made:
    return Asking(), tokens_and_labels


def backward() -> Made:
    return Backward(FusedAttention), tokens_and_labels


def around() -> Made:
    return Around(FusedAttention), tokens_and_labels


def pair() -> Made:
    return Pair(FusedAttention), tokens_and_labels


def summing() -> Made:
    return Summing(FusedAttention), tokens_and_labels


def deciding() -> Made:
    return Deciding(FusedAttention), tokens_and_labels

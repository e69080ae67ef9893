"""What torch's functions do with tensors of which each rank holds a part: one exact rule for each kind.

A function works on single elements, on dims that are whole on every rank, or only says in which order elements
lie; in each case the part of the result is the result of the part. Whole operands give the part that belongs
beside, and their gradients are sums over ranks. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.execute.cut import (
    Along,
    Call,
    Cut,
    Rule,
    entering,
    gathered,
    met_by,
    moved_to,
    part_of,
)
from planner.execute.cut_shapes import SHAPES
from planner.execute.loss import IGNORED, token_loss_sum
from planner.execute.phases import phase
from planner.execute.seeds import apart

_ELEMENTWISE = frozenset((
    "abs", "add", "addcdiv", "addcmul", "bitwise_and", "bitwise_not", "bitwise_or", "celu", "clamp",
    "clamp_max", "clamp_min", "clip", "cos", "deg2rad", "div", "divide", "elu", "eq", "erf", "erfc", "exp",
    "exp2", "expm1", "floor", "fmod", "ge", "gelu", "greater", "gt", "hardsigmoid", "hardswish", "hardtanh",
    "isfinite", "isinf", "isnan", "le", "leaky_relu", "lerp", "less", "log", "log10", "log1p", "log2",
    "log_sigmoid", "logical_and", "logical_not", "logical_or", "logsigmoid", "lt", "masked_fill", "maximum",
    "minimum", "mish", "mul", "multiply", "nan_to_num", "ne", "neg", "negative", "pow", "radd", "rdiv",
    "reciprocal", "relu", "relu6", "remainder", "rmul", "round", "rpow", "rsqrt", "rsub", "rtruediv", "selu",
    "sigmoid", "sign", "silu", "sin", "sinh", "softplus", "softsign", "sqrt", "square", "sub", "subtract",
    "tan", "tanh", "tanhshrink", "true_divide", "truediv", "trunc", "where", "iadd", "imul", "isub", "idiv",
    "itruediv", "conj", "and", "or", "invert",
))  # fmt: skip
_CASTS = frozenset((
    "bfloat16", "bool", "clone", "contiguous", "cpu", "cuda", "detach", "double", "float", "half", "int", "long",
    "to", "type", "type_as", "zeros_like", "ones_like", "full_like", "empty_like",
))  # fmt: skip
# float(x) and the like: their names without underscores are those of casts
_TO_NUMBERS = frozenset((
    "__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "tolist", "numpy", "__array__",
))  # fmt: skip
_ASKED = frozenset((
    "is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_tensor", "result_type", "repr", "format", "hash",
))  # fmt: skip
_ASKED_ATTRIBUTES = frozenset((
    "dtype", "device", "layout", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested",
    "requires_grad", "grad_fn", "is_cpu", "_base",
))  # fmt: skip
_OVER_DIMS = frozenset((
    "softmax", "log_softmax", "softmin", "mean", "sum", "amax", "amin", "var", "std", "prod", "norm",
    "logsumexp", "cumsum", "cumprod", "all", "any", "argmax", "argmin", "linalg_vector_norm", "vector_norm",
    "normalize",
))  # fmt: skip


def rule_of(call: Call) -> Rule:
    """The rule of a function, or one that refuses it."""
    name = call.name
    if call.writes_elsewhere:
        raise call.refused("out= is given")
    if getattr(call.func, "__name__", "") in _TO_NUMBERS:
        raise call.refused("numbers outside of tensors are wanted, and each rank has a part of them")
    if name in SHAPES:
        return SHAPES[name]
    if name in _RULES:
        return _RULES[name]
    base = name.removesuffix("_") if not name.endswith("__") else name
    if base in _ELEMENTWISE:
        return _elementwise
    if name in _CASTS:
        return _cast
    if name in _ASKED or name.removeprefix("get ") in _ASKED_ATTRIBUTES:
        return _asked
    if name in _OVER_DIMS:
        return _over_dims
    return _unknown


def _unknown(call: Call) -> Any:
    raise call.refused("not known to be the same on a part of a tensor")


def _elementwise(call: Call) -> Any:
    """Operands put below one another by their last dims; where one is cut the others are cut alike."""
    cuts = list(call.cuts())
    like = max(cuts, key=lambda cut: cut.local.dim())
    for other in cuts:
        if not like.along.like(other.along, like.local.dim(), other.local.dim()):
            raise call.refused(
                f"tensors of {list(like.whole_shape)} and {list(other.whole_shape)} cut differently"
            )
    if call.in_place:
        call.first()
    out = call.on_parts(lambda whole: met_by(whole, call, like.along, like.along.dim - like.local.dim()))
    if call.in_place:
        return call.args[0]
    return Cut.of(out, moved_to(like.along, out.dim() - like.local.dim() + like.along.dim))


def _cast(call: Call) -> Any:
    cut = call.first() if isinstance(call.args[0], Cut) else None
    out = call.on_parts()
    told = isinstance(out, str)  # x.type() without another type
    return out if cut is None or told else Cut.of(out, cut.along)


def _asked(call: Call) -> Any:
    return call.on_parts()


def _hooked(call: Call) -> Any:
    """A gradient has the parts of its tensor, and its hook sees it so."""
    cut, hook = call.first(), call.value(1, "hook")
    local: Any = cut.local
    return local.register_hook(lambda gradient: part_of(hook(Cut.of(gradient, cut.along))))


def _over_dims(call: Call) -> Any:
    """Over dims that are whole on every rank."""
    cut = call.first()
    place = {"norm": 2, "linalg_vector_norm": 2, "vector_norm": 2, "normalize": 2}.get(call.name, 1)
    dims = call.dims(place, default=1 if call.name == "normalize" else None)
    if dims is None:
        raise call.refused("over all elements, of which each rank has some")
    if cut.along.dim in dims:
        raise call.refused("over the dim that is cut")
    return _same_or_fewer(call, cut, dims, call.on_parts())


def _same_or_fewer(call: Call, cut: Cut, dims: Sequence[int], out: Any) -> Any:
    if isinstance(out, tuple):
        made = [_same_or_fewer(call, cut, dims, each) for each in out]
        return type(out)(made) if hasattr(out, "_fields") else tuple(made)
    gone = sum(dim < cut.along.dim for dim in dims) if out.dim() < cut.local.dim() else 0
    return Cut.of(out, moved_to(cut.along, cut.along.dim - gone))


def _norm_of_last(call: Call) -> Any:
    """layer_norm, rms_norm: over last dims that are whole; weights are shared by all parts."""
    cut = call.first()
    normalized = call.value(1, "normalized_shape")
    count = 1 if isinstance(normalized, int) else len(normalized)
    if cut.along.dim >= cut.local.dim() - count:
        raise call.refused("over the dim that is cut")
    return Cut.of(call.on_parts(lambda whole: entering(whole, cut.along.peers)), cut.along)


def _linear(call: Call) -> Any:
    """The same weights for every part, as where each head has the one projection."""
    cut = call.first()
    if cut.along.dim == cut.local.dim() - 1:
        raise call.refused("sums over the dim that is cut")
    return Cut.of(call.on_parts(lambda whole: entering(whole, cut.along.peers)), cut.along)


def _matmul(call: Call) -> Any:
    """Products of heads: cut along a dim of the batch, or along rows or columns of the result."""
    first, second = call.args[:2]
    if call.name == "rmatmul":
        first, second = second, first
    a, b = ((x.local, x.whole_shape) if isinstance(x, Cut) else (x, tuple(x.shape)) for x in (first, second))
    if min(len(a[1]), len(b[1])) < 2:
        raise call.refused("a vector is multiplied")
    places = {}  # of the result, from the end, by operand
    for x, shared, kept in ((first, -1, -2), (second, -2, -1)):
        if isinstance(x, Cut):
            k = x.along.dim - x.local.dim()
            if k == shared:
                raise call.refused("sums over the dim that is cut")
            assert k <= -2 or k == kept
            places[id(x)] = k, x.along
    if len({(k, along.size, along.parts, along.copies) for k, along in places.values()}) > 1:
        raise call.refused("tensors cut differently")
    k, along = next(iter(places.values()))

    def own(x: Any) -> Any:
        if isinstance(x, Cut):
            return x.local
        if k > -3:
            return entering(x, along.peers)
        return met_by(x, call, along, k)

    out = torch.matmul(own(first), own(second))
    return Cut.of(out, moved_to(along, out.dim() + k))


def _einsum(call: Call) -> Any:
    """Cut along a letter that stays in the result."""
    given = call.args[1:] if isinstance(call.args[0], str) else ()
    operands = list(given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given)
    equation = str(call.args[0]).replace(" ", "") if given else ""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(operands):
        raise call.refused("written without -> or with ...")
    cuts = [(term[x.along.dim], x.along) for term, x in zip(terms, operands, strict=True) if isinstance(x, Cut)]
    letter, along = cuts[0]
    if any(other != letter or not along.like(replace(found, dim=along.dim), 0, 0) for other, found in cuts):
        raise call.refused("tensors cut differently")
    if letter not in right:
        raise call.refused("sums over the dim that is cut")

    def own(term: str, x: Tensor) -> Tensor:
        if isinstance(x, Cut):
            return x.local
        whole = entering(x, along.peers)
        return along.own(whole, term.index(letter)) if letter in term else whole

    out = torch.einsum(equation, *(own(term, x) for term, x in zip(terms, operands, strict=True)))
    return Cut.of(out, moved_to(along, right.index(letter)))


def _attention(call: Call) -> Any:
    """Heads of each rank for themselves; a mask with a dim of heads gives those of this rank."""
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), call.args, strict=False))
    given |= call.kwargs
    query, key, value = (given.pop(name) for name in ("query", "key", "value"))
    if not isinstance(query, Cut):
        raise call.refused("keys are cut and queries are whole")
    along = query.along
    if along.dim > query.local.dim() - 3 or along.parts or along.copies > 1:
        raise call.refused("tensors that are cut, but not by heads")
    own = [query.local]
    for x in (key, value):
        if isinstance(x, Cut):
            in_line = x.along.dim - x.local.dim() == along.dim - query.local.dim()
            if not in_line or x.along.parts or (x.along.copies > 1 and x.along.size > x.along.ranks):
                raise call.refused("tensors cut differently")
            own.append(x.local)
        else:
            own.append(met_by(x, call, along, along.dim - query.local.dim()))
    mask = given.get("attn_mask")
    if isinstance(mask, Tensor):
        given["attn_mask"] = met_by(mask, call, along, along.dim - query.local.dim())
    out = _drawn(
        given.get("dropout_p", 0.0), along, lambda: F.scaled_dot_product_attention(own[0], own[1], own[2], **given)
    )
    return Cut.of(out, along)


def _dropout(call: Call) -> Any:
    """Each rank draws numbers of its own."""
    cut = call.first()
    active = call.value(2, "training", True)
    return Cut.of(_drawn(1.0 if active else 0.0, cut.along, call.on_parts), cut.along)


def _drawn(dropped: float, along: Along, run: Any) -> Tensor:
    out: Tensor = apart(run, along.number)() if dropped else run()
    return out


def _cross_entropy(call: Call) -> Any:
    """Each rank has the scores of some classes: log-sum-exp over ranks, without gathering them."""
    scores = call.first()
    given = dict(
        zip(("weight", "size_average", "ignore_index", "reduce", "reduction"), call.args[2:], strict=False)
    )
    given |= call.kwargs
    target = call.value(1, "target")
    given.pop("target", None)
    usual = {"label_smoothing": 0.0}
    chosen = ("reduction", "ignore_index")
    plain = all(value == usual.get(name) for name, value in given.items() if name not in chosen)
    reduction = given.get("reduction", "mean")
    along = scores.along
    if scores.local.dim() != 2 or along.dim != 1:
        raise call.refused("scores that are cut, but not [tokens, classes] along the classes")
    if not plain or reduction == "none" or target.is_floating_point():
        return F.cross_entropy(gathered(scores, along.peers), target, **given)
    if scores.local.is_meta:
        return F.cross_entropy(gathered(scores, along.peers), target, reduction=reduction)
    if given.get("ignore_index", IGNORED) != IGNORED:
        target = target.masked_fill(target == given["ignore_index"], IGNORED)
    with phase("loss"):
        total = token_loss_sum(scores.local, target, along.size, along.peers)
    return total if reduction == "sum" else total / (target != IGNORED).sum()


def _repeat_interleave(call: Call) -> Any:
    """Each head several times in a row, as the queries of grouped keys want it."""
    cut, repeats = call.first(), call.value(1, "repeats")
    dims = call.dims(2)
    if dims is None or not isinstance(repeats, int) or cut.along.parts:
        raise call.refused("without a dim, or unevenly")
    along = replace(cut.along, source=None)
    if dims[0] != along.dim:
        return Cut.of(call.on_parts(), along)
    more = replace(along, size=along.size * repeats)
    if along.copies > 1 and along.size == along.ranks and repeats % along.copies == 0:  # each rank has its share
        own = repeats // along.copies
        return Cut.of(cut.local.repeat_interleave(own, along.dim), replace(more, copies=1))
    return Cut.of(call.on_parts(), more)


def _gated(call: Call) -> Any:
    """glu: one half of the features, by the other's sigmoid."""
    first, second = call.first().chunk(2, call.value(1, "dim", -1))
    return first * second.sigmoid()


def _triangle(call: Call) -> Any:
    """tril and triu of whole rows and columns."""
    cut = call.first()
    if cut.along.dim >= cut.local.dim() - 2:
        raise call.refused("rows or columns that are cut")
    return Cut.of(call.on_parts(), cut.along)


def _complex(call: Call) -> Any:
    """Pairs of the last dim as complex numbers, and back."""
    cut = call.first()
    if call.name == "view_as_complex" and cut.along.dim == cut.local.dim() - 1:
        raise call.refused("the dim of pairs is cut")
    return Cut.of(call.on_parts(), cut.along)


def _joined(call: Call) -> Any:
    """cat and stack along a dim that is whole."""
    tensors = list(call.args[0] if call.args else call.kwargs["tensors"])
    like = next(x for x in tensors if isinstance(x, Cut))
    ndim = like.local.dim() + (call.name == "stack")
    dim = call.value(1, "dim", 0) % ndim
    place = like.along.dim + (call.name == "stack" and dim <= like.along.dim)
    if dim == place:
        raise call.refused("along the dim that is cut")
    own = []
    for x in tensors:
        if isinstance(x, Cut):
            if not like.along.like(x.along, like.local.dim(), x.local.dim()):
                raise call.refused("tensors cut differently")
            own.append(x.local)
        elif x.dim() != like.local.dim() or x.shape[like.along.dim] != like.along.size:
            raise call.refused("a tensor of another shape")
        else:
            own.append(like.along.own(entering(x, like.along.peers), like.along.dim))
    made = torch.stack(own, dim) if call.name == "stack" else torch.cat(own, dim)
    return Cut.of(made, moved_to(like.along, place))


_RULES: dict[str, Rule] = {
    "register_hook": _hooked,
    "layer_norm": _norm_of_last,
    "rms_norm": _norm_of_last,
    "linear": _linear,
    "matmul": _matmul,
    "rmatmul": _matmul,
    "bmm": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "dropout": _dropout,
    "dropout_": _dropout,
    "cross_entropy": _cross_entropy,
    "repeat_interleave": _repeat_interleave,
    "glu": _gated,
    "tril": _triangle,
    "triu": _triangle,
    "view_as_complex": _complex,
    "view_as_real": _complex,
    "cat": _joined,
    "concat": _joined,
    "stack": _joined,
}

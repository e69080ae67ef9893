"""The calls behind the cases of one device: products, attention, memory, launches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.measure.cases import AttentionCase, GemmCase, LaunchCase, MemoryCase
from planner.measure.clock import CAPTURE, Batch, each_of, host_seconds, timed, timed_kernel
from planner.units import MIB

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}

_COLD_BYTES = {"cpu": 16 * MIB, "cuda": 256 * MIB}  # more than the caches of a core or a GPU hold
_THIN_ROWS = 8


class NotMeasurableError(Exception):
    """This device or installation cannot run a case; the profile then says nothing about it."""


def gemm(case: GemmCase, device: str) -> Batch:
    """`[m, k] × [k, n]` with the weight kept as linear layers keep it, `[n, k]`, out of no cache.

    Training multiplies the same sizes in three ways, for a layer's output, its input's gradient and its weight's:
    wide products are timed in all three by turns, thin ones, which only serving has, in the first.
    """
    if case.dtype == "fp8":
        return _fp8_gemm(case, device)
    left = _rotated((case.m, case.k), _DTYPES[case.dtype], device)
    right = _rotated((case.n, case.k), _DTYPES[case.dtype], device)
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [F.linear]
    if case.m > _THIN_ROWS:
        ways += [
            lambda left, right: left @ right.view(case.k, case.n),
            lambda left, right: left.view(case.k, case.m).t() @ right.view(case.k, case.n),
        ]
    return _each_once([partial(_multiplied, way, left, right) for way in ways], device)


def _multiplied(
    way: Callable[[Tensor, Tensor], Tensor], left: Iterator[Tensor], right: Iterator[Tensor]
) -> Tensor:
    return way(next(left), next(right))


def _each_once(calls: Sequence[Callable[[], Tensor]], device: str) -> Batch:
    """Different calls, as often each: the mean of one."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return each_of(timed_kernel(all_of_them, device), len(calls))


def _rotated(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """Matrices in turn: between two uses of one so many others pass that a cache has lost it.

    On a GPU as many of them as a captured graph holds: it finds the smallest in its cache again.
    """
    elements = shape[0] * shape[1]
    count = max(2, _COLD_BYTES[device] // (elements * dtype.itemsize))
    random = _random(dtype, device)
    values = random.repeat(-(-count * elements // random.numel()))[: count * elements]
    return itertools.cycle(values.view(count, *shape).unbind())


@functools.cache
def _random(dtype: torch.dtype, device: str) -> Tensor:
    """Numbers that are not alike, drawn once: a GPU that multiplies equal ones draws less power."""
    return torch.randn(_COLD_BYTES[device] // dtype.itemsize, device=device).to(dtype)


def _fp8_gemm(case: GemmCase, device: str) -> Batch:
    # private, yet the only way to an fp8 product in torch itself
    scaled_mm: Any = getattr(torch, "_scaled_mm", None)
    if scaled_mm is None:
        raise NotMeasurableError("this torch has no fp8 products")
    left = torch.randn(case.m, case.k, device=device).to(_DTYPES["fp8"])
    weight = torch.randn(case.n, case.k, device=device).to(_DTYPES["fp8"])
    one = torch.ones((), device=device)
    return timed_kernel(
        lambda: scaled_mm(left, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), device
    )


def attention(case: AttentionCase, device: str) -> Batch:
    """`scaled_dot_product_attention`, causal except when decoding."""
    dtype = _DTYPES[case.dtype]

    def tensor(heads: int, length: int) -> Tensor:
        return torch.randn(case.batch, heads, length, case.head_dim, device=device).to(dtype)

    query = tensor(case.heads, case.query_len)
    key, value = tensor(case.kv_heads, case.kv_len), tensor(case.kv_heads, case.kv_len)
    causal, grouped = case.phase != "decode", case.kv_heads != case.heads

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    if case.phase != "backward":
        return timed_kernel(forward, device)
    inputs = [item.requires_grad_() for item in (query, key, value)]
    output = forward()
    gradient = torch.randn_like(output)
    return timed(lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True), device)


def memory(case: MemoryCase, device: str) -> Batch:
    """Bytes moved count both what is read and what is written."""
    if case.what == "copy":
        source = torch.zeros(case.bytes_ // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return timed_kernel(lambda: target.copy_(source), device)
    if case.what == "add":
        left, right = (torch.zeros(case.bytes_ // 12, device=device) for _ in range(2))
        out = torch.empty_like(left)
        return timed_kernel(lambda: torch.add(left, right, out=out), device)
    if case.what == "gelu":
        return _gelu(case, device)
    host = torch.zeros(case.bytes_, dtype=torch.uint8).pin_memory()
    other = torch.empty(case.bytes_, dtype=torch.uint8, device=device)
    source, target = (host, other) if case.what == "to_device" else (other, host)
    return timed(lambda: target.copy_(source, non_blocking=True), device)


def _gelu(case: MemoryCase, device: str) -> Batch:
    """Forward and backward in turn."""
    value, gradient = (torch.randn(case.gelus, device=device) for _ in range(2))
    backward: Callable[..., Tensor] = torch.ops.aten.gelu_backward
    ways = (partial(F.gelu, approximate="tanh"), partial(backward, gradient, approximate="tanh"))
    return _each_once([partial(way, value) for way in ways], device)


def launch(case: LaunchCase, device: str) -> Batch:
    """Host time of one small kernel, issued one by one, inside a compiled function, or from a graph."""
    if case.what == "eager":
        return _eager_launch(device)
    if case.what == "compiled":
        return _compiled_launch(device)
    value, one = torch.zeros(64, device=device), torch.ones(64, device=device)
    kernels = 100
    graph = torch.cuda.CUDAGraph()
    value.add_(one)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode=CAPTURE):
        for _ in range(kernels):
            value.add_(one)
    replay = host_seconds(graph.replay, device)
    return each_of(replay, kernels)


def _eager_launch(device: str) -> Batch:
    """Layers of the least size forward and backward: modules and autograd are part of what a kernel costs."""
    layers = 20
    stack = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(layers))).to(device)
    value = torch.zeros(16, 16, device=device, requires_grad=True)
    gradient = torch.zeros(16, 16, device=device)

    def step() -> None:
        stack.zero_grad()
        stack(value).backward(gradient)

    kernels = 3 * layers
    whole = host_seconds(step, device)
    return each_of(whole, kernels)


def _compiled_launch(device: str) -> Batch:
    """Products in a row, which no compiler fuses, so that its guards are shared as in a model."""
    kernels = 20
    square = torch.eye(16, device=device)

    def chain(value: Tensor) -> Tensor:
        for _ in range(kernels):
            value = value @ square
        return value

    compiled = _compiled(chain)
    whole = host_seconds(lambda: compiled(square), device)
    return each_of(whole, kernels)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    try:
        compiled: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    except Exception as error:
        raise NotMeasurableError(f"torch.compile: {error}") from None
    return compiled

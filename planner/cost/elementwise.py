"""Seconds of kernels that memory bounds, and of the host that issues kernels.

Sizes may be scalars or numpy arrays that broadcast. A fused kernel reads its inputs once and writes its
outputs once; which operators share a kernel is told in fusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.spec.hardware import Device, Elementwise, SoftwareStack
from planner.spec.workload import Optimizer
from planner.units import FP32_BYTES, MIB

_LOGIT_BYTES = FP32_BYTES  # losses are computed in fp32
_INDEX_BYTES = 8.0  # token ids and targets are int64
_STATISTIC_BYTES = FP32_BYTES  # a norm keeps its mean or inverse deviation of each token in fp32
_HOST_POWER = 8.0  # how sharply the longer of host and device rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that the kernels of one operation read and write."""

    forward_bytes: Any
    backward_bytes: Any


def elementwise_seconds(
    device: Device, curve: Elementwise, bytes_: Any, kernels: Any = 1, *, gelus: Any = 0.0
) -> Any:
    """Kernels bound by memory: kernels · floor + (bytes + kernels · half) / (bandwidth · efficiency) + gelus · ns.

    At `half` bytes a kernel reaches half the bandwidth, besides its floor. What fits the GPU's own cache is
    not priced cheaper. `gelus` are elements that go through a GELU, forward or backward.
    """
    ramp = kernels * curve.half_mib * MIB
    rate = device.memory_bandwidth * curve.bandwidth_efficiency
    return kernels * curve.floor_us * 1e-6 + (bytes_ + ramp) / rate + gelus * curve.gelu_ns * 1e-9


def norm_traffic(tokens: Any, hidden: Any, width: float, statistics: int = 1) -> Traffic:
    """A norm over the last dim: 1 statistic per token for RMS, 2 for layer norm.

    Backward reads the input and the output's gradient and writes the input's; weights are left out.
    """
    elements, kept = tokens * hidden, tokens * _STATISTIC_BYTES * statistics
    return Traffic(forward_bytes=2 * elements * width + kept, backward_bytes=3 * elements * width + kept)


def activation_traffic(tokens: Any, features: Any, width: float, gated: bool = False) -> Traffic:
    """A pointwise function of `features` outputs; gated, it multiplies a second input of the same size."""
    elements = tokens * features * width
    inputs = 2 if gated else 1
    return Traffic(forward_bytes=(inputs + 1) * elements, backward_bytes=(2 * inputs + 1) * elements)


def residual_traffic(tokens: Any, hidden: Any, width: float) -> Traffic:
    """A sum of two inputs; its backward hands the same gradient to both and moves nothing."""
    return Traffic(forward_bytes=3 * tokens * hidden * width, backward_bytes=0 * tokens * hidden)


def cast_bytes(elements: Any, from_width: float, to_width: float) -> Any:
    """Bytes of a conversion between dtypes."""
    return elements * (from_width + to_width)


def embedding_traffic(tokens: Any, hidden: Any, width: float, gradient_width: float = FP32_BYTES) -> Traffic:
    """Rows of a table: forward copies them; backward reads gradients and adds each to its row."""
    elements, ids = tokens * hidden, tokens * _INDEX_BYTES
    added = elements * (width + 2 * gradient_width)
    return Traffic(forward_bytes=2 * elements * width + ids, backward_bytes=added + ids)


def cross_entropy_traffic(tokens: Any, vocab: Any, width: float) -> Traffic:
    """Logits cast to fp32, log-softmax, and the loss of each target; backward to gradients in `width`.

    Forward: cast, and a pass that reads logits and writes log-probabilities. Backward: a pass that reads
    those and writes gradients, and the cast back.
    """
    logits = tokens * vocab
    cast = logits * (width + _LOGIT_BYTES) if width != _LOGIT_BYTES else 0.0 * logits
    both = cast + 2 * logits * _LOGIT_BYTES + tokens * (_INDEX_BYTES + _LOGIT_BYTES)
    return Traffic(forward_bytes=both, backward_bytes=both)


def optimizer_bytes_per_parameter(optimizer: Optimizer, width: float, gradient_width: float = FP32_BYTES) -> float:
    """Bytes of one step per parameter: gradient read; fp32 weight and moments read and written.

    Below fp32 a master weight is kept, and the working weight of `width` is written besides. SGD here has no
    momentum.
    """
    moments = 2 if optimizer == "adamw" else 0
    working = width if width < FP32_BYTES else 0.0
    return gradient_width + 2 * FP32_BYTES * (1 + moments) + working


def host_seconds(
    software: SoftwareStack,
    *,
    kernels: Any = 0,
    layers: Any = 0,
    expert_layers: Any = 0,
    collectives: Any = 0,
    steps: Any = 0,
) -> Any:
    """What the host spends to issue work: a sum over what it issues. `layers` counts each pass of a layer."""
    microseconds = (
        kernels * software.kernel_us
        + layers * software.layer_us
        + expert_layers * software.expert_layer_us
        + collectives * software.collective_us
        + steps * software.step_us
    )
    return microseconds * 1e-6


def issued_seconds(device_seconds: Any, issuing_seconds: Any) -> Any:
    """Device and host work side by side: the longer of both (the host runs ahead, or the device waits)."""
    return np.maximum(device_seconds, issuing_seconds)[()]


def host_waiting(issuing: Any, device: Any) -> Any:
    """What the host adds: parts of a block wait for it, others for the device, so the longer rules gradually."""
    longer, shorter = np.maximum(issuing, device), np.minimum(issuing, device)
    both = longer * (1.0 + (shorter / np.maximum(longer, 1e-30)) ** _HOST_POWER) ** (1.0 / _HOST_POWER)
    return both - device

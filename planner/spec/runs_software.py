"""The software of a run, told from the words of its row, and what its runs have in common.

Tables seldom say which attention a run had, what it overlapped or how its recipes fill in what they leave out.
That depends on the software, not on who measured: each entry states it, and the words it is known by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from planner.spec.workload import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What holds for a software's runs where a row is silent."""

    name: str
    stack: Stack
    unfused: bool = False  # attention from before fused kernels
    dropout: float = 0.0
    overlaps_gradients: bool = True
    half_gradients: bool = False  # of fp16 runs, in fp16
    hardware: tuple[tuple[str, float], ...] = ()  # keys of the profile that it changes
    nvidia_recipes: bool = False  # empty cells mean what NeMo and Megatron Bridge set


_XLA = Software(name="XLA", stack="compiled")
_ALPA = Software(name="Alpa", stack="compiled", unfused=True, overlaps_gradients=False, half_gradients=True)
_OLD_MEGATRON = Software(
    name="Megatron-LM before flash attention", stack="megatron", unfused=True, dropout=0.1,
    overlaps_gradients=False, half_gradients=True,
)  # fmt: skip
# BigScience ran its large models with blocking launches, and DeepSpeed's three buckets of 5e8 16-bit elements
_BIGSCIENCE = replace(
    _OLD_MEGATRON,
    name="Megatron-DeepSpeed",
    hardware=(("software.megatron.blocking", 3.2), ("memory.workspace_gib", 2.8)),
)
_NVIDIA = Software(name="Megatron as NVIDIA runs it", stack="megatron", nvidia_recipes=True)
_MEGATRON = Software(name="Megatron-LM", stack="megatron")

# words in the row: the software; the first line that is found holds
_KNOWN_BY: tuple[tuple[str, Software], ...] = (
    (r"maxtext|paxml|\bxla\b|\bjax\b", _XLA),
    (r"\balpa\b", _ALPA),
    (r"bigscience|megatron-deepspeed|deepspeed megatron|bloom \(arxiv", _BIGSCIENCE),
    (r"2104\.04473|2205\.05198|1909\.08053|\bsc'?21\b|megatron-lm (paper|2021)", _OLD_MEGATRON),
)
_BY_NVIDIA = re.compile(r"\bnvidia\b|\bnemo\b|nemotron|megatron-bridge|dgxc")
_BEFORE_AMPERE = re.compile(r"(V100|P100|T4)\b", re.I)
_COMPILED = re.compile(r"\bcompiled?\b|torch\.compile")
_NOT_COMPILED = re.compile(r"(no|without|not) (torch\.)?compile")


def software_of(origin: str, text: str, gpu: str) -> Software:
    """The software that a row tells of; plain torch where none is known.

    `origin` is who measured, `text` all words of the row, both in small letters. FlashAttention needs an Ampere
    GPU: Megatron on older ones is old Megatron.
    """
    for pattern, software in _KNOWN_BY:
        if re.search(pattern, text):
            return software
    megatron = _NVIDIA if _BY_NVIDIA.search(origin) else _MEGATRON if "megatron" in text else None
    if megatron is not None:
        return _OLD_MEGATRON if _BEFORE_AMPERE.match(gpu) else megatron
    compiled = bool(_COMPILED.search(text)) and not _NOT_COMPILED.search(text)
    return Software(name="torch", stack="compiled" if compiled else "eager")

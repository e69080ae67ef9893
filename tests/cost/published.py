"""Published training steps, written down by hand: what ran, how fast it was said to be, where that stands.

Each figure was found in two places that agree. Papers count FLOPs differently, so each row names its formula and
is turned into seconds a step by it; only seconds are compared.

With B sequences of s tokens, L layers of width h and a vocabulary of V:

- `hardware`, Narayanan et al. 2021, eq. 3: 96·B·s·L·h²·(1 + s/6h + V/16Lh), full recompute counted.
- `model`, Korthikanti et al. 2022, appendix A: 72·B·s·L·h²·(1 + s/6h + V/12Lh), recompute left out.
- `seconds`: the step time itself is published.

Left out, for want of a second place: the full-recompute column of Korthikanti's table 5, and the Llama 3 paper's
table 4 (its 400 TFLOP/s a GPU do not say how attention is counted).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

A100_PEAK_TFLOPS = 312.0

_SC21 = (
    "Narayanan et al. 2021 (arXiv 2104.04473), table 1; the same in images/cases_april2021.png of "
    "NVIDIA/Megatron-LM at de6f8cc, layouts in its examples/sc21/run_table_1.sh"
)
_KORTHIKANTI = (
    "Korthikanti et al. 2022 (arXiv 2205.05198), table 5; utilisation also in the README of NVIDIA/Megatron-LM "
    "at de6f8cc"
)
_BLOOM = "Le Scao et al. 2022 (arXiv 2211.05100), section 3.4; layout in tr11-176B-ml.slurm of bigscience"
_NEMOTRON = "Nvidia 2024 (Nemotron-4 340B Technical Report, arXiv 2406.11704), table 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A run as `planner.estimate` takes it, and its published figure."""

    name: str
    citation: str
    counted: Literal["hardware", "model", "seconds"]
    figure: float  # TFLOP/s of a GPU, or seconds where those are published
    model: dict[str, Any]
    hardware: str
    gpus: int
    workload: dict[str, Any]
    strategy: dict[str, Any]
    billions: float = 0.0  # parameters as published; 0 where they are not

    @property
    def flops(self) -> float:
        """Of a step, as the source counts them."""
        h, layers, vocab = (float(self.model[key]) for key in ("hidden", "layers", "vocab"))
        s, batch = float(self.workload["seq_len"]), float(self.workload["global_batch"])
        if self.counted == "hardware":
            return 96.0 * batch * s * layers * h**2 * (1.0 + s / (6.0 * h) + vocab / (16.0 * layers * h))
        return 72.0 * batch * s * layers * h**2 * (1.0 + s / (6.0 * h) + vocab / (12.0 * layers * h))

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return self.figure if self.counted == "seconds" else self.flops / (self.figure * 1e12 * self.gpus)


def _gpt(name: str, layers: int, hidden: int, heads: int, vocab: int = 51_200) -> dict[str, Any]:
    """A GPT as Megatron trained it before flash attention."""
    return {
        "name": name, "layers": layers, "hidden": hidden, "heads": heads, "ffn": 4 * hidden, "vocab": vocab,
        "tied_embeddings": True, "attention": "unfused", "dropout": 0.1, "attention_dropout": 0.1,
    }  # fmt: skip


def _sc21(
    name: str, billions: float, layers: int, hidden: int, heads: int, tp: int, pp: int, gpus: int, batch: int,
    microbatch: int, vpp: int, tflops: float,
) -> Published:  # fmt: skip
    """fp16, full recompute, 1F1B or interleaved, no sequence parallel."""
    return Published(
        name=f"Megatron {name}", citation=_SC21, counted="hardware", figure=tflops, hardware="dgx-a100-80g",
        gpus=gpus, billions=billions, model=_gpt(name, layers, hidden, heads),
        workload={"seq_len": 2048, "global_batch": batch, "precision": "fp16", "stack": "megatron"},
        strategy={"tp": tp, "pp": pp, "vpp": vpp, "microbatch": microbatch, "recompute": "full",
                  "grad_dtype": "fp16", "overlap": {"dp": False}},
    )  # fmt: skip


def _korthikanti(
    name: str, layers: int, hidden: int, heads: int, pp: int, gpus: int, batch: int, microbatch: int, vpp: int,
    seconds: float,
) -> Published:  # fmt: skip
    """Sequence parallel and selective recompute; one replica."""
    return Published(
        name=f"Megatron {name}, selective recompute", citation=_KORTHIKANTI, counted="seconds", figure=seconds,
        hardware="dgx-a100-80g", gpus=gpus, model=_gpt(name, layers, hidden, heads),
        workload={"seq_len": 2048, "global_batch": batch, "precision": "fp16", "stack": "megatron"},
        strategy={"tp": 8, "pp": pp, "vpp": vpp, "microbatch": microbatch, "sp": True, "recompute": "selective",
                  "grad_dtype": "fp16", "overlap": {"dp": False}},
    )  # fmt: skip


def _bloom(name: str, counted: Literal["hardware", "seconds"], figure: float) -> Published:
    """48 nodes of Jean Zay: four 100 Gb/s Omni-Path cards for eight A100."""
    return Published(
        name=name, citation=_BLOOM, counted=counted, figure=figure, hardware="dgx-a100-80g", gpus=384,
        billions=176.2,
        model={**_gpt("BLOOM", 70, 14_336, 112, vocab=250_880), "positions": "alibi", "embedding_norm": True},
        workload={"seq_len": 2048, "global_batch": 2048, "precision": "bf16", "stack": "megatron"},
        strategy={"tp": 4, "pp": 12, "microbatch": 2, "zero": 1, "recompute": "full", "overlap": {"dp": False}},
    )  # fmt: skip


def _nemotron(gpus: int, batch: int, seconds: float) -> Published:
    """Interleaved; the microbatch and the virtual stages are not told: one sequence, a layer each."""
    return Published(
        name=f"Nemotron-4 340B on {gpus}", citation=_NEMOTRON, counted="seconds", figure=seconds,
        hardware="dgx-h100", gpus=gpus, billions=341.0,
        model={"name": "nemotron4-340b", "layers": 96, "hidden": 18_432, "heads": 96, "kv_heads": 8, "ffn": 73_728,
               "vocab": 256_000, "ffn_kind": "relu2", "positions": "rope", "bias": False, "max_positions": 4096},
        workload={"seq_len": 4096, "global_batch": batch, "precision": "bf16", "stack": "megatron"},
        strategy={"tp": 8, "pp": 12, "vpp": 8, "sp": True, "zero": 1, "overlap": {"tp": True, "pp": True}},
    )  # fmt: skip


PUBLISHED: tuple[Published, ...] = (
    #     name    billions layers hidden heads tp pp  gpus  batch mb vpp TFLOP/s
    _sc21("1.7B", 1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137.0),
    _sc21("3.6B", 3.6, 30, 3072, 32, 2, 1, 64, 512, 16, 1, 138.0),
    _sc21("7.5B", 7.5, 36, 4096, 32, 4, 1, 128, 512, 16, 1, 142.0),
    _sc21("18B", 18.4, 40, 6144, 48, 8, 1, 256, 1024, 8, 1, 135.0),
    _sc21("39B", 39.1, 48, 8192, 64, 8, 2, 512, 1536, 4, 1, 138.0),
    _sc21("76B", 76.1, 60, 10_240, 80, 8, 4, 1024, 1792, 2, 3, 140.0),
    _sc21("145B", 145.6, 80, 12_288, 96, 8, 8, 1536, 2304, 2, 2, 148.0),
    _sc21("310B", 310.1, 96, 16_384, 128, 8, 16, 1920, 2160, 1, 2, 155.0),
    _sc21("530B", 529.6, 105, 20_480, 128, 8, 35, 2520, 2520, 1, 3, 163.0),
    _sc21("1T", 1008.0, 128, 25_600, 160, 8, 64, 3072, 3072, 1, 1, 163.0),
    #            name  layers hidden heads pp gpus batch mb vpp seconds
    _korthikanti("22B", 48, 6144, 64, 1, 8, 4, 4, 1, 1.10),
    _korthikanti("175B", 96, 12_288, 96, 8, 64, 64, 1, 3, 13.75),
    _korthikanti("530B", 105, 20_480, 128, 35, 280, 280, 1, 3, 37.83),
    _korthikanti("1T", 128, 25_600, 160, 64, 512, 512, 1, 1, 71.49),
    _bloom("BLOOM, fastest configuration", "hardware", 156.0),
    _bloom("BLOOM, a step of the final run", "seconds", 104.7),
    _nemotron(1536, 768, 10.3),
    _nemotron(3072, 1536, 10.3),
    _nemotron(6144, 2304, 8.0),
)

# the README's model FLOPs utilisation of Korthikanti's four, which their seconds must reproduce
KORTHIKANTI_UTILISATION = {"22B": 0.415, "175B": 0.514, "530B": 0.560, "1T": 0.563}

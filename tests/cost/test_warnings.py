"""Each warning appears where it should, says the number, and stays away from a sound layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from planner import api
from planner.spec.estimate import Estimate
from planner.spec.model import ModelSpec
from tests.tiny import tiny_spec

WIDE = {
    "layers": 8,
    "hidden": 2048,
    "heads": 16,
    "kv_heads": 16,
    "ffn": 8192,
    "vocab": 16384,
    "max_positions": 4096,
}


def estimated(
    strategy: Mapping[str, Any] | None = None,
    *,
    gpus: int = 8,
    workload: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    hardware: Mapping[str, Any] | None = None,
    base: str = "dgx-h100",
) -> Estimate:
    spec: ModelSpec = tiny_spec("llama", **(WIDE | dict(model or {})))
    return api.estimate(
        spec,
        {"base": base, "set": dict(hardware or {})},
        gpus,
        {"seq_len": 4096, "global_batch": 64, "stack": "megatron", **(workload or {})},
        strategy,
    )


def warned(words: str, *given: Any, **keys: Any) -> str:
    """The one warning with these words."""
    found = [text for text in estimated(*given, **keys).warnings if words in text]
    assert len(found) <= 1
    return found[0] if found else ""


def test_a_sound_layout_has_none() -> None:
    assert estimated({"tp": 2, "sp": True, "microbatch": 4}, workload={"global_batch": 512}).warnings == ()


def test_tensor_parallelism_across_network_cards() -> None:
    assert "16 crosses network cards" in warned("crosses", {"tp": 16}, gpus=16)
    assert not warned("crosses", {"tp": 8}, gpus=16)
    assert warned("crosses", {"tp": 4, "order": "dp-tp-cp-pp"}, gpus=16), "not innermost"


def test_exposed_tensor_parallelism_within_a_node() -> None:
    text = warned("tensor parallelism is exposed", {"tp": 4}, base="rtx4090-pcie", gpus=4)
    assert "smaller tp" in text
    assert "overlap tp" in text
    hidden = warned(
        "tensor parallelism is exposed", {"tp": 4, "overlap": {"tp": True}}, base="rtx4090-pcie", gpus=4
    )
    assert hidden
    assert "overlap tp" not in hidden
    assert not warned("tensor parallelism is exposed", {"tp": 2})


def test_sequence_parallelism_left_off() -> None:
    assert "each of the 4" in warned("sequence parallelism is off", {"tp": 4})
    assert not warned("sequence parallelism is off", {"tp": 4, "sp": True})
    assert not warned("sequence parallelism is off", {"tp": 1})
    assert not warned("sequence parallelism is off", {"tp": 4}, workload={"seq_len": 1022})


def test_bubble_and_its_remedies() -> None:
    few = {"global_batch": 8}
    text = warned("wait for each other", {"pp": 8, "dp": 1}, workload=few)
    assert "8 microbatches for 8 stages" in text
    assert "virtual stages" in text
    assert "smaller microbatch" not in text
    assert "1 microbatch for 8" in warned("wait for", {"pp": 8, "microbatch": 8}, workload=few)
    assert "smaller microbatch" in warned("wait for", {"pp": 8, "microbatch": 8}, workload=few)
    assert not warned("wait for each other", {"pp": 2, "dp": 4}, workload={"global_batch": 256})


def test_a_heavy_head_is_named() -> None:
    text = warned("times the mean", {"pp": 4}, model={"vocab": 262_144})
    assert text.startswith("stage 3 of 4 takes")
    assert "the vocabulary's head" in text
    assert not warned("times the mean", {"pp": 4}, model={"vocab": 1024})


def test_uneven_layers_are_named() -> None:
    text = warned("times the mean", {"pp": 4}, model={"layers": 5, "vocab": 1024})
    assert "it has 2 layers, others 1" in text


def test_exposed_exchange_between_replicas() -> None:
    text = warned(
        "gradients and parameters", {"overlap": {"dp": False}}, workload={"global_batch": 8}, base="h100-pcie"
    )
    assert "overlap dp" in text
    assert not warned("gradients and parameters", {}, workload={"global_batch": 1024})


def test_host_bound() -> None:
    small = {"hidden": 64, "heads": 4, "kv_heads": 4, "ffn": 128, "vocab": 128}
    text = warned("host", {"tp": 2}, model=small, workload={"stack": "eager", "seq_len": 64})
    assert "less tensor parallelism or stack compiled" in text
    alone = warned("host", {}, model=small, workload={"stack": "eager", "seq_len": 64})
    assert "tensor parallelism" not in alone
    assert not warned("host", {"tp": 2, "microbatch": 4})


def test_little_room_left() -> None:
    high = estimated({"tp": 2, "sp": True}).uncertainty.memory_bytes.high / 2**30
    tight = {"device.memory_gib": 1.05 * high}
    assert "of the GPU's" in warned("memory may come within", {"tp": 2, "sp": True}, hardware=tight)
    roomy = {"device.memory_gib": 1.2 * high}
    assert not warned("memory may come within", {"tp": 2, "sp": True}, hardware=roomy)
    out = {"device.memory_gib": 0.9 * high}
    assert not warned("memory may come within", {"tp": 2, "sp": True}, hardware=out), "the verdict says so"


def test_most_of_it_assumed() -> None:
    small = {"hidden": 64, "heads": 4, "kv_heads": 4, "ffn": 128, "vocab": 128}
    found = estimated({}, model=small, workload={"stack": "eager", "seq_len": 64})
    (text,) = [text for text in found.warnings if "assumed numbers" in text]
    assert text.startswith(f"{100 * found.uncertainty.sources.assumed:.0f} %")
    assert not warned("assumed numbers", {})


def test_heads_of_keys_and_values_kept_twice() -> None:
    assert "each is computed and kept on 4 ranks" in warned("kv heads", {"tp": 8}, model={"kv_heads": 2})
    assert not warned("kv heads", {"tp": 2}, model={"kv_heads": 2})


def test_padding_of_a_small_vocabulary() -> None:
    assert "of 100 is padded to 104 for tp 8: 4 % more" in warned("padded", {"tp": 8}, model={"vocab": 100})
    assert not warned("padded", {"tp": 8}, model={"vocab": 50257})


def test_a_last_node_that_is_not_full() -> None:
    assert warned("stay idle", gpus=12, workload={"global_batch": 60}) == (
        "12 GPUs fill 1 node of 8 and 4 of another: its other 4 stay idle"
    )
    assert not warned("stay idle", gpus=16)
    assert not warned("stay idle", gpus=4), "part of a single node is what was asked for"


def test_the_gravest_stands_first() -> None:
    found = estimated({"tp": 16}, gpus=16, model={"kv_heads": 8}).warnings
    assert "crosses network cards" in found[0]
    assert "kv heads" in found[-1]


@pytest.mark.parametrize("kind", ["gpt", "mixtral", "deepseek", "bert", "t5", "vit", "unfused"])
def test_every_kind_of_model_can_be_judged(kind: str) -> None:
    spec = tiny_spec(kind)
    strategy = {"tp": 2} if kind == "t5" else {"tp": 2, "pp": 2}
    found = api.estimate(spec, "dgx-h100", 8, {"stack": "eager", "global_batch": 16}, strategy)
    assert found.warnings
    assert all("nan" not in text and not text.endswith(".") for text in found.warnings)

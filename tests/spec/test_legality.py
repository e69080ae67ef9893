"""Every rule: a case that keeps it, one that breaks it, and what the user is told."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from planner.errors import PlannerError
from planner.spec.legality import (
    READS,
    RULES,
    Case,
    Violation,
    nearest_batches,
    padded_vocab,
    require_legal,
    violations,
)
from planner.spec.model import ModelSpec
from planner.spec.strategy import Overlap, Strategy
from planner.spec.workload import TrainWorkload, workload_from_dict
from tests.spec.examples import EXPERT_MODEL, MODEL, STRATEGY, example
from tests.spec.spec_strategies import models, parallel_strategies
from tests.spec.strategies import STEADY, values_of

LLAMA = ModelSpec.from_dict(MODEL)
MIXTRAL = ModelSpec.from_dict(EXPERT_MODEL)
DEEPSEEK = ModelSpec.from_dict(
    example(EXPERT_MODEL, moe={"experts": 256, "top_k": 8, "expert_ffn": 2048, "shared_experts": 1})
)
GPT = ModelSpec.from_dict({"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "vocab": 50257})
T5 = ModelSpec.from_dict(
    {"kind": "encoder_decoder", "layers": 24, "encoder_layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096,
     "vocab": 32128, "positions": "relative"}
)  # fmt: skip
VIT = ModelSpec.from_dict(
    {"kind": "vision", "layers": 24, "hidden": 1024, "heads": 16, "ffn": 4096,
     "vision": {"image_size": 224, "patch_size": 14}}
)  # fmt: skip


def found(
    model: ModelSpec | None, strategy: dict[str, Any], workload: dict[str, Any] | None = None, gpus: int = 0
) -> list[Violation]:
    asked = workload_from_dict(workload or {"global_batch": 1024}, model=model)
    given_strategy = Strategy.from_dict(strategy)
    return list(violations(model, asked, given_strategy, gpus or given_strategy.gpus))


def broken(*arguments: Any, **keywords: Any) -> list[str]:
    return [item.name for item in found(*arguments, **keywords)]


@pytest.mark.parametrize(
    ("model", "strategy", "workload"),
    [
        (LLAMA, STRATEGY, {"global_batch": 128}),
        (LLAMA, {"tp": 16, "sp": True}, {}),  # 8 kv heads, each on two ranks
        (LLAMA, {"sp": True}, {"seq_len": 4095}),  # sp with tp 1 splits nothing
        (LLAMA, {"pp": 4, "vpp": 5, "dp": 2, "zero": 3, "dp_replicate": 2}, {}),
        (LLAMA, {"pp": 2, "vpp": 41}, {}),  # embedding and head alone on the outer stages
        (LLAMA, {"pp": 4, "schedule": "gpipe"}, {"global_batch": 2}),
        (LLAMA, {"pp": 4, "vpp": 2, "schedule": "zbv"}, {"global_batch": 3}),
        (LLAMA, {"pp": 4, "vpp": 2, "schedule": "zb"}, {"global_batch": 10}),  # two rounds of five
        (LLAMA, {"cp": 4, "tp": 8, "sp": True}, {"seq_len": 8192}),
        (LLAMA, {"pp": 4, "zero": 2}, {"stack": "megatron"}),
        (LLAMA, {"pp": 4}, {"global_batch": 2, "stack": "megatron"}),
        (MIXTRAL, {"tp": 2, "dp": 8, "ep": 8, "etp": 2}, {}),
        (MIXTRAL, {"tp": 8, "ep": 8}, {}),
        (MIXTRAL, {"dp": 8, "ep": 4, "zero": 3, "dp_replicate": 2}, {}),
        (MIXTRAL, {"dp": 8, "ep": 4, "zero": 3, "dp_replicate": 4}, {"stack": "megatron"}),
        (DEEPSEEK, {"dp": 64, "ep": 64, "zero": 1}, {}),
        (T5, {"tp": 8, "dp": 4}, {}),
        (VIT, {"tp": 8, "pp": 4}, {}),
        (None, {"tp": 7, "dp": 3}, {"global_batch": 3}),
        (LLAMA, {"tp": 8, "pp": 2, "replicas": 3}, {"mode": "serve"}),
        (MIXTRAL, {"tp": 2, "attention_dp": 4, "ep": 8}, {"mode": "serve"}),
    ],
)
def test_legal(model: ModelSpec | None, strategy: dict[str, Any], workload: dict[str, Any]) -> None:
    asked = workload if "mode" in workload else {"global_batch": 1024, **workload}
    assert found(model, strategy, asked) == []


@pytest.mark.parametrize(
    ("name", "model", "strategy", "workload", "key", "remedy"),
    [
        ("mode", LLAMA, {"replicas": 2}, {}, "replicas", "leave replicas out"),
        ("mode", LLAMA, {"dp": 2, "replicas": 2}, {"mode": "serve"}, "dp", "leave dp out"),
        ("mode", LLAMA, {"zero": 1}, {"mode": "serve"}, "zero", "leave zero out"),
        ("serving", T5, {}, {"mode": "serve"}, "mode", "use mode: train"),
        ("heads", GPT, {"tp": 8}, {}, "tp", "set tp to 6 or 12"),
        ("kv_heads", example(MODEL, heads=40, kv_heads=10, head_dim=128, ffn=40960), {"tp": 4}, {}, "tp",
         "set tp to 2 or 5"),
        ("ffn", example(MODEL, ffn=28676), {"tp": 8}, {}, "tp", "set tp to 4"),
        ("ffn", example(EXPERT_MODEL, moe={"experts": 8, "top_k": 2, "expert_ffn": 1024, "shared_experts": 1,
                                           "shared_expert_ffn": 1030}), {"tp": 4}, {}, "tp", "set tp to 2"),
        ("experts", LLAMA, {"dp": 8, "ep": 8}, {}, "ep", "leave ep out"),
        ("experts", LLAMA, {"tp": 8, "etp": 8}, {}, "etp", "leave etp out"),
        ("experts", MIXTRAL, {"dp": 16, "ep": 16}, {}, "ep", "set ep to 8"),
        ("experts", example(EXPERT_MODEL, moe={"experts": 8, "top_k": 2, "expert_ffn": 100}),
         {"tp": 8, "etp": 8}, {}, "etp", "set etp to 5 or 10"),
        ("expert_ranks", MIXTRAL, {"tp": 2, "dp": 3, "ep": 4}, {"global_batch": 3}, "ep",
         "set ep·etp to 3 or 6"),
        ("expert_ranks", MIXTRAL, {"tp": 8, "ep": 4}, {"mode": "serve"}, "ep",
         "give ep and etp of product 8"),
        ("dp_replicate", LLAMA, {"dp": 8, "zero": 3, "dp_replicate": 3}, {}, "dp_replicate",
         "set dp_replicate to 2 or 4"),
        ("dp_replicate", LLAMA, {"dp": 8, "dp_replicate": 2}, {}, "dp_replicate",
         "leave dp_replicate out, or set zero to 1 or more"),
        ("expert_copies", MIXTRAL, {"dp": 8, "ep": 4, "zero": 3, "dp_replicate": 4}, {}, "dp_replicate",
         "set dp_replicate to 2"),
        ("positions", GPT, {}, {"seq_len": 4096, "global_batch": 8}, "seq_len",
         "use at most 2048 tokens, or raise max_positions"),
        ("positions", GPT, {}, {"mode": "serve", "input_len": 2000, "output_len": 100}, "input_len",
         "use at most 2048 tokens, or raise max_positions"),
        ("positions", VIT, {}, {"seq_len": 256, "global_batch": 8}, "seq_len", "set seq_len to 257"),
        ("context", LLAMA, {"cp": 3}, {"seq_len": 4096, "global_batch": 8}, "cp",
         "set seq_len to 4092 or 4098"),
        ("sequence", LLAMA, {"tp": 8, "cp": 2, "sp": True}, {"seq_len": 4100, "global_batch": 8}, "sp",
         "set seq_len to 4096 or 4112, or leave sp out"),
        ("layers", LLAMA, {"pp": 83}, {}, "pp", "use pp·vpp of at most 82"),
        ("encoder_decoder", T5, {"pp": 2}, {}, "pp", "set pp to 1 and use tp or dp"),
        ("encoder_decoder", T5, {"cp": 2}, {}, "cp", "set cp to 1 and use tp or dp"),
        ("batch", LLAMA, {"dp": 48}, {"global_batch": 128}, "global_batch",
         "set global_batch to 96 or 144, or change dp, microbatch or pp"),
        ("batch", LLAMA, {"dp": 48}, {"global_batch": 7}, "global_batch",
         "set global_batch to 48, or change dp, microbatch or pp"),
        ("batch", LLAMA, {"pp": 8, "dp": 3}, {"global_batch": 20}, "global_batch",
         "set global_batch to 24, or change dp, microbatch or pp"),
        ("virtual_stages", LLAMA, {"vpp": 2, "schedule": "1f1b"}, {}, "vpp", "set vpp to 1, or pp above 1"),
        ("virtual_stages", LLAMA, {"schedule": "zbv"}, {}, "schedule", "leave schedule out"),
        ("virtual_stages", LLAMA, {"pp": 2, "vpp": 2, "schedule": "gpipe"}, {}, "vpp",
         "use schedule interleaved, or vpp 1"),
        ("virtual_stages", LLAMA, {"pp": 2, "schedule": "zb"}, {}, "vpp", "set vpp to 2, or use 1f1b"),
        ("virtual_stages", LLAMA, {"pp": 2, "vpp": 4, "schedule": "zbv"}, {}, "vpp", "set vpp to 2"),
        ("microbatches", LLAMA, {"pp": 8}, {"global_batch": 6}, "global_batch",
         "set global_batch to 8, or change dp, microbatch or pp"),
        ("microbatches", LLAMA, {"pp": 4, "vpp": 2, "dp": 2}, {"global_batch": 22}, "global_batch",
         "set global_batch to 20 or 24, or change dp, microbatch or pp"),
        ("zero", LLAMA, {"pp": 2, "dp": 2, "zero": 2}, {}, "zero", "use zero 1 or 3 with pp"),
        ("compiled", LLAMA, {"pp": 2, "vpp": 2, "schedule": "zb"}, {"global_batch": 8, "stack": "compiled"},
         "schedule", "use interleaved, or stack: eager"),
        ("run_again", LLAMA, {"pp": 2, "vpp": 2, "schedule": "zb", "recompute": "selective"}, {}, "recompute",
         "set recompute to none, or schedule to interleaved"),
    ],
)  # fmt: skip
def test_illegal(
    name: str, model: Any, strategy: dict[str, Any], workload: dict[str, Any], key: str, remedy: str
) -> None:
    spec = ModelSpec.from_dict(model) if isinstance(model, dict) else model
    (only,) = found(spec, strategy, workload or {"global_batch": 1024})
    assert (only.name, only.key, only.remedy) == (name, key, remedy)
    assert only.value
    assert only.rule


@pytest.mark.parametrize(
    ("strategy", "workload", "gpus", "remedy"),
    [
        ({"tp": 8, "dp": 2}, {}, 64, "set dp to 8"),
        ({"tp": 8, "dp": 2}, {}, 12, "give a multiple of 8 GPUs"),
        ({"tp": 8, "replicas": 2}, {"mode": "serve"}, 32, "set replicas to 4"),
    ],
)
def test_the_degrees_take_the_gpus(
    strategy: dict[str, Any], workload: dict[str, Any], gpus: int, remedy: str
) -> None:
    (only,) = found(LLAMA, strategy, workload or None, gpus)
    assert (only.name, only.key, only.remedy) == ("gpus", "gpus", remedy)


def test_each_rule_is_broken_in_some_test_above() -> None:
    parameters = {
        case[0] for mark in test_illegal.pytestmark for case in mark.args[1]  # type: ignore[attr-defined]
    }  # fmt: skip
    assert parameters | {"gpus"} == set(RULES)


def test_the_first_is_raised_and_the_others_named() -> None:
    with pytest.raises(PlannerError) as caught:
        require_legal(GPT, workload_from_dict({"global_batch": 3}, model=GPT), Strategy(tp=5, dp=2), 10)
    assert (caught.value.key, caught.value.value) == ("tp", "12 heads, tp 5")
    assert "divides the global batch" in caught.value.remedy
    require_legal(GPT, workload_from_dict({}, model=GPT), Strategy(tp=4), 4)


def test_without_a_model_only_its_rules_are_silent() -> None:
    assert broken(None, {"tp": 7, "dp": 4, "ep": 3}, {"global_batch": 6}) == ["expert_ranks", "batch"]


def test_the_vocabulary_is_padded() -> None:
    assert padded_vocab(50257, 8) == 50264
    assert padded_vocab(50264, 8) == 50264


@settings(max_examples=100, **STEADY)
@given(strategy=parallel_strategies(), workload=values_of(TrainWorkload), model=st.none() | models())
def test_any_question_has_an_answer(strategy: Strategy, workload: TrainWorkload, model: ModelSpec | None) -> None:
    for item in violations(model, workload, strategy, 64):
        assert item.name in RULES
        assert hasattr(strategy, item.key) or hasattr(workload, item.key) or item.key == "mode"
        assert item.remedy


@settings(max_examples=200, **STEADY)
@given(pp=st.integers(1, 12), unit=st.integers(1, 12), batch=st.integers(1, 500), schedule=st.sampled_from(
    ["1f1b", "gpipe", "interleaved", "zb"]))  # fmt: skip
def test_the_nearest_batches_are_legal_and_nearest(pp: int, unit: int, batch: int, schedule: Any) -> None:
    vpp = 2 if pp > 1 and schedule in ("interleaved", "zb") else 1
    strategy = Strategy(pp=pp, dp=unit, vpp=vpp, schedule=schedule if pp > 1 else "1f1b")

    def runs(count: int) -> bool:
        return not broken(None, strategy.to_dict(), {"global_batch": count})

    near = nearest_batches(TrainWorkload(seq_len=8, global_batch=batch, precision="bf16"), strategy)
    above = next(count for count in range(batch + 1, 10_000) if runs(count))
    below = [count for count in range(batch - 1, 0, -1) if runs(count)][:1]
    assert near == (*below, above)


def drawn(chance: random.Random) -> Strategy:
    """Any strategy, small degrees most of the time so that rules are kept as well as broken."""

    def degree() -> int:
        return chance.choice([1, 1, 2, 2, 3, 4, 6, 8, 16, 48])

    return Strategy(
        **{key: degree() for key in ("tp", "pp", "dp", "cp", "ep", "etp", "microbatch", "dp_replicate")},
        vpp=chance.choice([1, 1, 2, 4, 20]), zero=chance.randrange(4), sp=chance.random() < 0.5,
        attention_dp=chance.choice([1, 1, 1, 2]), replicas=chance.choice([1, 1, 1, 2]),
        schedule=chance.choice(["gpipe", "1f1b", "interleaved", "zb", "zbv"]),
        recompute=chance.choice(["none", "selective", "full", "auto"]),
        order=chance.choice(["tp-cp-dp-pp", "tp-cp-pp-dp", "pp-dp-cp-tp"]),
        overlap=Overlap(tp=chance.random() < 0.5, dp=chance.random() < 0.5),
        grad_dtype=chance.choice(["fp32", "bf16"]),
    )  # fmt: skip


def test_a_rule_reads_the_keys_that_it_says_and_no_others() -> None:
    chance = random.Random(5)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for _ in range(3000):
        model = chance.choice([LLAMA, MIXTRAL, DEEPSEEK, GPT, T5, VIT, None])
        workload = TrainWorkload(
            seq_len=chance.choice([257, 1024, 4096, 12288]), global_batch=chance.choice([7, 96, 1024, 3072]),
            precision="bf16", stack=chance.choice(["eager", "compiled", "megatron"]),
        )  # fmt: skip
        strategy, other, gpus = drawn(chance), drawn(chance), chance.choice([8, 64, 96])
        told = {item.name for item in violations(model, workload, strategy, gpus)}
        for name, rule in RULES.items():
            read = {key: getattr(strategy, key) for key in READS[name]}
            for asked in (Strategy(**read), replace(other, **read)):
                assert (rule(Case(model, workload, asked, gpus)) is not None) == (name in told), (name, asked)
            verdicts[name, name in told] += 1
    assert set(READS) == set(RULES)
    assert {name for name in RULES if not verdicts[name, False]} == set()
    assert {name for name in RULES if not verdicts[name, True]} == {"serving"}, "training is not served"


def test_a_rule_needs_every_key_that_it_says_it_reads() -> None:
    """Each key moves the verdict in some case: a key too many would be asked about too often."""
    chance = random.Random(6)
    moved = set()
    for _ in range(6000):
        model = chance.choice([LLAMA, MIXTRAL, T5])
        workload = TrainWorkload(
            seq_len=4096, global_batch=chance.choice([6, 96, 1024]), precision="bf16",
            stack=chance.choice(["eager", "compiled"]),
        )  # fmt: skip
        strategy, other, gpus = drawn(chance), drawn(chance), 64
        for name, rule in RULES.items():
            verdict = rule(Case(model, workload, strategy, gpus)) is None
            for key in READS[name]:
                changed = replace(strategy, **{key: getattr(other, key)})
                if (rule(Case(model, workload, changed, gpus)) is None) != verdict:
                    moved.add((name, key))
    assert moved == {(name, key) for name in RULES for key in READS[name]}

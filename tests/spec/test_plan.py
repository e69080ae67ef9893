"""Plans: the file a person reads, editing it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.spec.hardware import HardwareProfile
from planner.spec.model import ModelSpec
from planner.spec.paths import Span
from planner.spec.plan import ModuleSplit, Plan, content_digest, load_plan, read_plan
from planner.spec.workload import ServeWorkload
from planner.spec.yaml_text import parse_yaml
from tests.spec.examples import MODEL, PLAN, PROFILE, SERVE, example, sealed_plan

READABLE = """\
version: 1
model: llama3.1-70b
hardware: dgx-h100
gpus: 64
workload: {seq_len: 4096, global_batch: 128, precision: bf16}
strategy: {tp: 8, pp: 4, dp: 2, zero: 1, sp: true, recompute: selective}
mesh: {pp: 4, dp: 2, tp: 8}
"""

MODULES = """\
modules:
  embedding: {split: vocab, output: sequence}
  layers.0-79.attention.query: {split: column, input: sequence, output: features}
  layers.0-79.attention.output: {split: row, input: features, output: sequence}
  layers.3.attention.output: {split: replicate}
  head: {split: vocab, input: sequence, output: features}
recompute: {layers.0-18: selective, layers.0-2: full}
collectives:
- {stages: 0-3, axis: tp, phase: forward, kind: all_gather, count: 2624, bytes: 1000000000}
- {stages: 0, axis: dp, phase: gradient_sync, kind: all_reduce, count: 9, bytes: 100000000}
"""


def test_the_file_is_for_people() -> None:
    text = sealed_plan().to_yaml()
    assert text.startswith(READABLE)
    assert MODULES in text
    assert "- {layers: [0-18], forward_seconds: 0.125, backward_seconds: 0.25}\n" in text


def test_save_and_load(tmp_path: Path) -> None:
    plan, path = sealed_plan(), tmp_path / "plan.yaml"
    plan.save(path)
    assert load_plan(path) == plan
    assert load_plan(str(path)).to_yaml() == path.read_text(encoding="utf-8") == plan.to_yaml()
    assert [item.name for item in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="cannot be written"):
        sealed_plan().save(tmp_path / "missing" / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


def test_the_question_is_the_estimates_too() -> None:
    plan = sealed_plan()
    assert plan.estimate.model == plan.model
    assert plan.estimate.strategy == plan.strategy
    assert "workload" not in plan.to_dict()["estimate"]


def test_splits_and_recompute_by_module_path() -> None:
    plan = sealed_plan()
    row = ModuleSplit(split="row", input="features", output="sequence")
    assert plan.split_of("layers.79.attention.output") == row
    assert plan.split_of("layers.3.attention.output") == ModuleSplit(split="replicate")
    assert plan.split_of("layers.80.attention.output") is None
    assert [plan.recompute_of(f"layers.{layer}") for layer in (0, 2, 3, 18, 19)] == [
        "full", "full", "selective", "selective", "none",
    ]  # fmt: skip


def test_without_lines_blocks_recompute_what_the_strategy_says() -> None:
    assert Plan.from_dict(example(PLAN, recompute={})).recompute_of("layers.7") == "selective"
    assert (
        Plan.from_dict(example(PLAN, recompute={}, strategy__recompute="auto")).recompute_of("layers.7") == "none"
    )
    assert Plan.from_dict(example(PLAN, recompute={"layers.7": "full"})).recompute_of("layers.8") == "none"


def test_an_edit_is_noticed() -> None:
    plan = sealed_plan()
    assert not plan.edited
    data, source = parse_yaml(plan.to_yaml().replace("layers.3.attention", "layers.4.attention"))
    edited = Plan.from_dict(data, source)
    assert edited.edited
    assert not edited.sealed().edited
    slower = plan.to_dict() | {"command": "made by hand"}
    assert not Plan.from_dict(slower).edited, "only what the executor applies counts"


def test_virtual_stages_run_in_the_order_of_the_schedule() -> None:
    def order(schedule: str, layers: list[list[str]]) -> list[tuple[int, Any]]:
        strategy = {"pp": 2, "vpp": 2, "schedule": schedule}
        stages = [{"layers": spans} for spans in layers]
        memory = PLAN["estimate"]["memory_per_stage"][:2]
        changes = {"strategy": strategy, "gpus": 2, "stages": stages, "collectives": []}
        plan = Plan.from_dict(example(PLAN, estimate__memory_per_stage=memory, **changes))
        return [(rank, span.to_plain()) for rank, _, span in plan.virtual_stages()]

    looped = order("interleaved", [["none", "3-4"], ["0-2", "5-9"]])
    assert looped == [(0, "none"), (1, "0-2"), (0, "3-4"), (1, "5-9")]
    turned = order("zbv", [["0-1", "6-9"], ["2-4", "5-5"]])
    assert turned == [(0, "0-1"), (1, "2-4"), (1, 5), (0, "6-9")]
    with pytest.raises(PlannerError, match="starts with layer 2") as caught:
        order("interleaved", [["0-1", "6-9"], ["3-4", "5-5"]])
    assert caught.value.key == "stages.1.layers.0"


def test_gap_of_the_certificate() -> None:
    data = example(PLAN, certificate__bound=7.0)
    plan = Plan.from_dict(data)
    assert plan.certificate is not None
    assert plan.certificate.gap == pytest.approx(0.2)
    assert plan.to_dict()["certificate"]["gap"] == pytest.approx(0.2)
    without = example(PLAN)
    del without["certificate"]
    assert Plan.from_dict(without).certificate is None


def test_a_model_given_by_its_keys_travels_along() -> None:
    plan = Plan.from_dict({**PLAN, "model_spec": ModelSpec.from_dict(MODEL), "hardware_profile": PROFILE})
    data, source = parse_yaml(plan.to_yaml())
    again = Plan.from_dict(data, source)
    assert again.model_spec == ModelSpec.from_dict(MODEL)
    assert again.hardware_profile == HardwareProfile.from_dict(PROFILE)


def test_serving_plans() -> None:
    latency = {"prefill": {"matmul_seconds": 0.5}, "tpot_seconds": 0.01}
    strategy = {"tp": 8, "pp": 4, "replicas": 2}
    plan = Plan.from_dict(
        example(PLAN, workload=SERVE, strategy=strategy, estimate__latency=latency, estimate__fits=True)
    )
    assert isinstance(plan.workload, ServeWorkload)
    assert list(plan.mesh.items()) == [("replicas", 2), ("pp", 4), ("tp", 8)]
    assert Plan.from_dict(plan.to_dict()) == plan


def test_digests_speak_of_content() -> None:
    model = ModelSpec.from_dict(MODEL)
    reordered = ModelSpec.from_dict(dict(reversed(MODEL.items())))
    assert content_digest(model) == content_digest(reordered)
    assert content_digest(model) != content_digest(ModelSpec.from_dict({**MODEL, "layers": 81}))
    assert content_digest(Span(0, 3)) == content_digest("0-3")
    plan = sealed_plan()
    plan.require_same("0" * 63 + "1", "0" * 63 + "2")
    with pytest.raises(PlannerError) as caught:
        plan.require_same("0" * 63 + "1", "f" * 64)
    assert caught.value.key == "digests.hardware"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"version": 2}, "version"),
        ({"version": "1"}, "version"),
        ({"version": True}, "version"),
        ({"version": None}, "version"),
        ({"gpus": 32}, "gpus"),
        ({"strategy__tp": 4}, "gpus"),
        ({"strategy__pp": 8}, "estimate.memory_per_stage"),
        ({"stages": PLAN["stages"][:3]}, "stages"),
        ({"stages__1__layers": ["20-39"]}, "stages.1.layers.0"),
        ({"stages__1__layers": ["10-39"]}, "stages.1.layers.0"),
        ({"stages__1__layers": ["19-30", "31-39"]}, "stages.1.layers"),
        ({"stages__1__layers": ["39-19"]}, "stages.1.layers.0"),
        ({"stages__1__layers": "19-39"}, "stages.1.layers"),
        ({"mesh": {"tp": 8, "dp": 2, "pp": 4}}, "mesh"),
        ({"mesh": {"pp": 4, "dp": 2, "tp": 4}}, "mesh"),
        ({"mesh": 3}, "mesh"),
        ({"digests__model": "abc"}, "digests.model"),
        ({"digests__layout": "G" * 64}, "digests.layout"),
        ({"modules__head": {"split": "colum"}}, "modules.head.split"),
        ({"modules__head": {"split": "column", "output": "feature"}}, "modules.head.output"),
        ({"modules": {"layers.9-0.mlp": {"split": "row"}}}, "modules"),
        ({"recompute": {"layers.0": "auto"}}, "recompute.layers.0"),
        ({"recompute": {"": "full"}}, "recompute"),
        ({"collectives__0__stages": "0-4"}, "collectives"),
        ({"collectives__0__stages": -1}, "collectives.0.stages"),
        ({"collectives__0__axis": "tpp"}, "collectives.0.axis"),
        ({"certificate__bound": 9.0}, "certificate.bound"),
        ({"certificate__objective": 9.0}, "certificate.objective"),
        ({"certificate__solved": 14}, "certificate.candidates"),
        ({"certificate__gap": 0.1}, "certificate.gap"),
        ({"estimate__model": "gpt2"}, "estimate.model"),
        ({"estimate__step_seconds": 9.0}, "estimate.step_seconds"),
        ({"estimate": 3}, "estimate"),
        ({"runners_up__0__strategy__tp": "8"}, "runners_up.0.strategy.tp"),
        ({"runner_up": []}, "runner_up"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(PlannerError) as caught:
        Plan.from_dict(example(PLAN, **changes))
    assert caught.value.key == key
    assert caught.value.remedy
    assert caught.value.value is not None


def test_a_newer_version_asks_for_an_upgrade() -> None:
    with pytest.raises(PlannerError) as caught:
        Plan.from_dict({"version": 99})
    assert caught.value.remedy == "upgrade tp-plan"
    with pytest.raises(PlannerError) as caught:
        Plan.from_dict({})
    assert (caught.value.value, caught.value.remedy) == ("no version", "make the plan again with tp-plan plan")
    with pytest.raises(PlannerError, match="a plan has the key strategy") as caught:
        Plan.from_dict({key: value for key, value in sealed_plan().to_dict().items() if key != "strategy"})
    assert caught.value.key == "strategy"


def test_an_illegal_edit_names_its_line(tmp_path: Path) -> None:
    text = sealed_plan().to_yaml().replace("split: replicate", "split: diagonal")
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlannerError) as caught:
        load_plan(path)
    line = text[: text.index("diagonal")].count("\n") + 1
    assert caught.value.where == f"{path}:{line}"


def test_a_plan_with_the_places_of_its_keys(tmp_path: Path) -> None:
    plan, path = sealed_plan(), tmp_path / "plan.yaml"
    plan.save(path)
    found, source = read_plan(path)
    assert found == plan
    line = plan.to_yaml().splitlines().index("  layers.3.attention.output: {split: replicate}") + 1
    assert source.place(("modules", "layers.3.attention.output")) == f"{path}:{line}"


def test_stages_that_do_not_follow_one_another_name_their_line(tmp_path: Path) -> None:
    text = sealed_plan().to_yaml().replace("layers: [19-39]", "layers: [20-39]")
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlannerError, match="starts with layer 19") as caught:
        load_plan(path)
    assert caught.value.where == f"{path}:{text[: text.index('[20-39]')].count(chr(10)) + 1}"


@pytest.mark.parametrize("pp", [2, 8])
def test_another_pp_with_its_stages_waits_for_new_figures(pp: int) -> None:
    each = 80 // pp
    stages = [{"layers": [f"{stage * each}-{stage * each + each - 1}"]} for stage in range(pp)]
    dp = 64 // 8 // pp
    data = example(sealed_plan().to_dict(), strategy__pp=pp, strategy__dp=dp, stages=stages)
    del data["mesh"]
    plan = Plan.from_dict(data)
    assert len(plan.estimate.memory_per_stage) == pp
    assert plan.collectives == ()
    assert plan.edited


def test_figures_of_another_number_of_stages_are_refused_where_the_stages_are_not_edited() -> None:
    data = example(sealed_plan().to_dict())
    data["estimate"]["memory_per_stage"].pop()
    with pytest.raises(PlannerError) as caught:
        Plan.from_dict(data)
    assert caught.value.key == "estimate.memory_per_stage"

"""Plans that a person edited: what the new figures must be, and what is refused with its line and reason."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from planner.cost.training import TrainingCost
from planner.errors import PlannerError
from planner.search.arranged import arrangement_of, settled
from planner.search.plans import re_estimated
from planner.spec.graph import Graph
from planner.spec.plan import Plan, load_plan, read_plan
from planner.spec.strategy import Strategy
from tests.cost.training_cases import exact, tiny, workload
from tests.search.arrangements import EXACT, any_arrangement, arranged, edit, planned, read_again
from tests.spec.examples import PLAN, SERVE, example
from tests.tiny import tiny_spec

LLAMA = tiny("llama", 4)
TP2 = {"tp": 2, "pp": 2, "dp": 2}

UP = "  blocks.0-3.ffn.up: {split: column, output: features}\n"
GATE = "  blocks.0-3.ffn.gate: {split: column, output: features}\n"
DOWN = "  blocks.0-3.ffn.down: {split: row, input: features}\n"
WHOLE_FFN = "".join(f"  blocks.2.ffn.{name}: {{split: replicate}}\n" for name in ("gate", "up", "down"))


def llama(**strategy: Any) -> Plan:
    return planned(LLAMA, arranged(LLAMA, TP2 | strategy))


def seconds(**strategy: Any) -> tuple[float, float]:
    """Forward and backward of one layer."""
    layer = TrainingCost(LLAMA, EXACT, workload()).alone(Strategy.from_dict(TP2 | strategy)).blocks["blocks.0"]
    return float(layer.forward_seconds[0]), float(layer.backward_seconds[0])


def test_a_plan_read_unchanged_is_what_it_was(tmp_path: Path) -> None:
    plan = llama(recompute="selective", sp=True)
    path = edit(plan, tmp_path)
    assert read_plan(path)[0] == load_plan(path) == plan
    assert read_again(path, LLAMA) == plan


# what a person changes


def test_a_block_that_recomputes_is_slower_and_keeps_less(tmp_path: Path) -> None:
    before = llama()
    after = read_again(
        edit(before, tmp_path, ("collectives:\n", "recompute: {blocks.0: full}\ncollectives:\n")), LLAMA
    )
    (ahead, back), (_, back_again) = seconds(), seconds(recompute="full")
    added = after.stages[0].backward_seconds - before.stages[0].backward_seconds
    assert added == pytest.approx(back_again - back, rel=1e-9)
    assert 0 < added < ahead, "the last exchange of a forward is not run again"
    assert after.stages[0].forward_seconds == before.stages[0].forward_seconds
    assert after.stages[1] == before.stages[1]
    assert after.estimate.step_seconds > before.estimate.step_seconds
    kept = [plan.estimate.memory_per_stage[0].activations_bytes for plan in (before, after)]
    assert kept[1] < kept[0]
    assert after.estimate.memory_per_stage[1] == before.estimate.memory_per_stage[1]
    assert after.strategy.recompute == "auto"
    assert not after.edited
    assert after.certificate is None


def test_a_stage_border_takes_a_layers_time_and_weights_along(tmp_path: Path) -> None:
    before = llama()
    path = edit(before, tmp_path, ("{layers: [0-1]", "{layers: [0-2]"), ("{layers: [2-3]", "{layers: [3]"))
    after = read_again(path, LLAMA)
    ahead, back = seconds()
    for stage, sign in ((0, 1), (1, -1)):
        one, other = before.stages[stage], after.stages[stage]
        assert other.forward_seconds - one.forward_seconds == pytest.approx(sign * ahead, rel=1e-9)
        assert other.backward_seconds - one.backward_seconds == pytest.approx(sign * back, rel=1e-9)
    # a layer's weights: attention 64·(64 + 32 + 32 + 64), feed-forward 3·64·128, both halved, and two norms
    weights = [plan.estimate.memory_per_stage[0].weights_bytes for plan in (before, after)]
    elements = (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128) / 2 + 2 * 64
    assert weights[1] - weights[0] == pytest.approx(elements * weight_bytes(before), rel=1e-9)


def weight_bytes(plan: Plan) -> float:
    """What the weights take by element: the last stage has two layers, the last norm and half of the head."""
    elements = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 4 * 64 + 64 + 100 * 64 / 2
    return plan.estimate.memory_per_stage[1].weights_bytes / elements


def test_a_layer_whose_feed_forward_stays_whole_takes_more_memory_and_fewer_exchanges(tmp_path: Path) -> None:
    before = llama()
    after = read_again(edit(before, tmp_path, (DOWN, DOWN + WHOLE_FFN)), LLAMA)
    weights = [plan.estimate.memory_per_stage[1].weights_bytes for plan in (before, after)]
    assert weights[1] - weights[0] == pytest.approx(3 * 64 * 128 / 2 * weight_bytes(before), rel=1e-9)
    assert after.stages[0] == before.stages[0]
    reduces = [
        sum(
            item.count
            for item in plan.collectives
            if item.phase == "forward" and 1 in item.stages and item.axis == "tp"
        )
        for plan in (before, after)
    ]
    assert reduces[0] - reduces[1] == 32, "one reduction less in each of 64 / 2 microbatches"
    assert [pattern for pattern in after.modules if ".ffn.up" in pattern] == [
        "blocks.0-1,3.ffn.up",
        "blocks.2.ffn.up",
    ]


def test_a_key_of_the_strategy(tmp_path: Path) -> None:
    before = llama()
    strategy = "strategy: {tp: 2, pp: 2, dp: 2"
    larger = read_again(edit(before, tmp_path, (strategy, strategy + ", microbatch: 2")), LLAMA)
    held = [plan.estimate.memory_per_stage[0].activations_bytes for plan in (before, larger)]
    assert held[1] == pytest.approx(2 * held[0])
    sharded = read_again(edit(before, tmp_path, (strategy, strategy + ", zero: 1")), LLAMA)
    assert sharded.estimate.memory.optimizer_bytes < before.estimate.memory.optimizer_bytes
    assert sharded.stages == before.stages


def test_lines_follow_sequence_parallelism_switched_on_or_off(tmp_path: Path) -> None:
    off, on = llama(), llama(sp=True)
    strategy = "strategy: {tp: 2, pp: 2, dp: 2"
    assert read_again(edit(off, tmp_path, (strategy, strategy + ", sp: true")), LLAMA).to_yaml() == on.to_yaml()
    assert read_again(edit(on, tmp_path, (strategy + ", sp: true", strategy)), LLAMA).to_yaml() == off.to_yaml()


def test_what_is_whole_stays_so_when_sequence_parallelism_is_switched_on(tmp_path: Path) -> None:
    whole = {3: frozenset(name for name in products() if name.startswith("blocks.0.ffn") or "ffn" in name)}
    off, on = (planned(LLAMA, arranged(LLAMA, TP2 | {"sp": sp}, whole=whole)) for sp in (False, True))
    strategy = "strategy: {tp: 2, pp: 2, dp: 2"
    assert read_again(edit(off, tmp_path, (strategy, strategy + ", sp: true")), LLAMA).to_yaml() == on.to_yaml()


def products() -> list[str]:
    return [operator.name for operator in LLAMA.blocks["blocks.0"].operators if operator.kind == "matmul"]


def test_tensor_parallelism_switched_on_cuts_what_can_be_cut(tmp_path: Path) -> None:
    before = planned(LLAMA, arranged(LLAMA, {"dp": 4}))
    path = edit(
        before,
        tmp_path,
        ("strategy: {dp: 4}", "strategy: {dp: 2, tp: 2}"),
        ("mesh: {dp: 4}", "mesh: {dp: 2, tp: 2}"),
    )
    assert read_again(path, LLAMA).to_yaml() == planned(LLAMA, arranged(LLAMA, {"dp": 2, "tp": 2})).to_yaml()


def test_tensor_parallelism_switched_off_leaves_no_lines(tmp_path: Path) -> None:
    path = edit(
        planned(LLAMA, arranged(LLAMA, {"dp": 2, "tp": 2})), tmp_path,
        ("strategy: {tp: 2, dp: 2}", "strategy: {dp: 4}"), ("mesh: {dp: 2, tp: 2}", "mesh: {dp: 4}"),
    )  # fmt: skip
    assert read_again(path, LLAMA).to_yaml() == planned(LLAMA, arranged(LLAMA, {"dp": 4})).to_yaml()


def test_another_number_of_stages_needs_no_figures(tmp_path: Path) -> None:
    plan = planned(LLAMA, arranged(LLAMA, {"pp": 2, "dp": 2}))
    text = plan.to_yaml()
    start, end = text.index("stages:\n- {"), text.index("collectives:" if "collectives:" in text else "")
    path = tmp_path / "plan.yaml"
    for pp, stages in ((4, ["none", "0-1", "2", "3"]), (1, ["0-3"])):
        lines = "stages:\n" + "".join(f"- {{layers: [{span}]}}\n" for span in stages)
        edited = (text[:start] + lines + text[end:]).replace("{pp: 2, dp: 2}", f"{{pp: {pp}, dp: {4 // pp}}}")
        path.write_text("\n".join(line for line in edited.splitlines() if not line.startswith("mesh")))
        held = {4: (0, 2, 1, 1), 1: (4,)}[pp]
        expected = planned(LLAMA, arranged(LLAMA, {"pp": pp, "dp": 4 // pp}, layers=held))
        assert read_again(str(path), LLAMA).to_yaml() == expected.to_yaml()


# recomputation is said block by block; the strategy's word alone stands for all blocks


def test_the_strategys_word_alone_changed(tmp_path: Path) -> None:
    none, full = llama(), llama(recompute="full")
    strategy = "strategy: {tp: 2, pp: 2, dp: 2"
    path = edit(none, tmp_path, (strategy, strategy + ", recompute: full"))
    assert read_again(path, LLAMA).to_yaml() == full.to_yaml()
    assert (
        read_again(edit(full, tmp_path, (strategy + ", recompute: full", strategy)), LLAMA).to_yaml()
        == none.to_yaml()
    )


def test_the_lines_count_where_they_were_changed(tmp_path: Path) -> None:
    full = llama(recompute="full")
    path = edit(full, tmp_path, ("recompute: {blocks.0-3: full}", "recompute: {blocks.0-3: selective}"))
    assert read_again(path, LLAMA).to_yaml() == llama(recompute="selective").to_yaml()
    some = read_again(
        edit(full, tmp_path, ("recompute: {blocks.0-3: full}", "recompute: {'blocks.1,3': full}")), LLAMA
    )
    assert some.recompute == {"blocks.1,3": "full"}
    assert some.strategy.recompute == "auto"


# what is refused


@pytest.mark.parametrize(
    ("change", "key", "line", "remedy"),
    [
        ((UP, UP + "  blocks.3.ffn.upp: {split: replicate}\n"), "modules.blocks.3.ffn.upp", "ffn.upp",
         "did you mean blocks.3.ffn.up?"),
        ((UP, UP.replace("blocks.0-3", "blocks.0-3.more")), "modules.blocks.0-3.more.ffn.up", "more.ffn",
         "did you mean blocks.0-3.ffn.up?"),
        ((UP, UP + "  blocks.3.ffn.up: {split: replicate}\n"), "modules.blocks.3.ffn.up", "  blocks.3.ffn.up",
         "beside its other modules write {split: column, input: replicate, output: features}"),
        ((UP, UP.replace("column", "replicate").replace(", output: features", "")), "modules.blocks.0-3.ffn.up",
         "blocks.0-3.ffn.up", "beside its other modules write {split: column"),
        ((DOWN, DOWN.replace("row", "column")), "modules.blocks.0-3.ffn.down", "ffn.down",
         "write {split: row, input: features, output: replicate}"),
        ((DOWN, DOWN + "  blocks.1.attention.key: {split: replicate}\n"), "modules.blocks.1.attention.key",
         "blocks.1.attention.key", "write {split: column"),
        ((GATE, ""), "modules.blocks.0.ffn.gate", "modules:", "add blocks.0.ffn.gate with split: column"),
        ((GATE, GATE.replace("0-3", "0-2")), "modules.blocks.3.ffn.gate", "modules:", "add blocks.3.ffn.gate"),
        (("collectives:\n", "recompute: {blocks.4: full}\ncollectives:\n"), "recompute.blocks.4", "recompute: {",
         "did you mean blocks.0-3?"),
        (("collectives:\n", "recompute: {head: full}\ncollectives:\n"), "recompute.head", "recompute: {",
         "use one of: blocks.0-3"),
        (("{layers: [2-3]", "{layers: [2]"), "stages.1.layers.0", "{layers: [2]", "end with 3"),
        (("{layers: [2-3]", "{layers: [2-9]"), "stages.1.layers.0", "{layers: [2-9]", "end with 3"),
        (("{layers: [2-3]", "{layers: [3-4]"), "stages.1.layers.0", "{layers: [3-4]", "without gap"),
        (("{tp: 2, pp: 2, dp: 2}\nmesh", "{tp: 2, pp: 2, dp: 2, microbatch: 3}\nmesh"), "workload.global_batch",
         "workload:", "set global_batch to"),
        (("{tp: 2, pp: 2, dp: 2}\nmesh", "{tp: 2, pp: 2, dp: 2, zero: 2}\nmesh"), "strategy.zero", "strategy:",
         "zero 1 or 3"),
        (("{tp: 2, pp: 2, dp: 2}\nmesh", "{tp: 2, pp: 2, dp: 2, ep: 2}\nmesh"), "strategy.ep", "strategy:",
         "leave ep out"),
        (("global_batch: 64", "global_batch: 65"), "workload.global_batch", "workload:", "set global_batch to"),
    ],
)  # fmt: skip
def test_what_cannot_run_names_line_and_remedy(
    change: tuple[str, str], key: str, line: str, remedy: str, tmp_path: Path
) -> None:
    path = edit(llama(), tmp_path, change)
    with pytest.raises(PlannerError) as caught:
        read_again(path, LLAMA)
    text = Path(path).read_text(encoding="utf-8")
    error = caught.value
    assert error.key == key
    assert error.where == f"{path}:{text[: text.index(line)].count(chr(10)) + 1}"
    assert remedy in error.remedy
    assert error.value


def test_a_tied_table_and_head_are_cut_alike(tmp_path: Path) -> None:
    graph = tiny("gpt")
    plan = planned(graph, arranged(graph, {"tp": 2}))
    path = edit(
        plan, tmp_path, ("  embedding.tokens: {split: vocab}\n", "  embedding.tokens: {split: replicate}\n")
    )
    with pytest.raises(PlannerError, match="share a weight") as caught:
        read_again(path, graph)
    assert caught.value.key.startswith("modules.")
    assert caught.value.where.startswith(f"{path}:")


def test_a_stage_with_nothing_to_run(tmp_path: Path) -> None:
    plan = planned(LLAMA, arranged(LLAMA, {"pp": 4}))
    path = edit(plan, tmp_path, ("{layers: [1]", "{layers: [none]"), ("{layers: [2]", "{layers: [1-2]"))
    with pytest.raises(PlannerError, match="a virtual stage holds a layer") as caught:
        read_again(path, LLAMA)
    assert caught.value.key == "stages.1.layers.0"


def test_sequence_parallelism_wants_attention_by_heads(tmp_path: Path) -> None:
    """A whole attention reads all tokens; where sp is switched on, a rank has a part of them."""
    attention = {1: frozenset(name for name in products() if "attention" in name)}
    plan = planned(LLAMA, arranged(LLAMA, TP2, whole=attention))
    assert "blocks.0.attention.query" in plan.modules
    path = edit(plan, tmp_path, ("dp: 2}\nmesh", "dp: 2, sp: true}\nmesh"))
    with pytest.raises(PlannerError, match="reads all tokens"):
        read_again(path, LLAMA)


def test_heads_are_judged_where_the_model_is_known(tmp_path: Path) -> None:
    plan = planned(LLAMA, arranged(LLAMA, {"tp": 2, "dp": 4}))
    path = edit(
        plan,
        tmp_path,
        ("strategy: {tp: 2, dp: 4}", "strategy: {tp: 8}"),
        ("mesh: {dp: 4, tp: 2}", "mesh: {tp: 8}"),
    )
    with pytest.raises(PlannerError, match="tp divides the attention heads") as caught:
        read_again(path, LLAMA)
    assert caught.value.key == "strategy.tp"


def test_plans_of_serving_are_not_arranged() -> None:
    latency = {"prefill": {"matmul_seconds": 0.5}, "tpot_seconds": 0.01}
    strategy = {"tp": 8, "pp": 4, "replicas": 2}
    plan = Plan.from_dict(
        example(PLAN, workload=SERVE, strategy=strategy, estimate__latency=latency, estimate__fits=True)
    )
    with pytest.raises(PlannerError) as caught:
        arrangement_of(plan, LLAMA)
    assert (caught.value.key, caught.value.where) == ("workload.mode", "")


def test_more_gpus_than_the_cluster_has(tmp_path: Path) -> None:
    small = exact(topology__flat__gpus=8)
    plan = planned(LLAMA, arranged(LLAMA, {"dp": 8}), profile=small)
    path = edit(
        plan,
        tmp_path,
        ("gpus: 8\n", "gpus: 16\n"),
        ("strategy: {dp: 8}", "strategy: {dp: 16}"),
        ("mesh: {dp: 8}", "mesh: {dp: 16}"),
    )
    with pytest.raises(PlannerError, match="at most 8 GPUs"):
        read_again(path, LLAMA, small)


# whatever a person does to the file


@pytest.mark.parametrize("seed", range(6))
def test_any_edit_gives_a_plan_or_an_error(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    name, strategy = [
        ("llama", TP2), ("gpt", {"tp": 2, "sp": True}), ("mixtral", {"tp": 2, "dp": 2, "ep": 4}),
        ("deepseek", {"tp": 2, "pp": 2, "sp": True}), ("llama", {"pp": 2, "vpp": 2}), ("t5", {"tp": 2, "dp": 2}),
    ][seed]  # fmt: skip
    graph = tiny(name) if name == "t5" else tiny(name, 6)
    text = planned(graph, any_arrangement(draw, graph, strategy)).to_yaml()
    path, outcomes = tmp_path / "plan.yaml", Counter[str]()
    for _ in range(50):
        path.write_text(_scribbled(draw, text), encoding="utf-8")
        outcomes[_outcome(path, graph)] += 1
    assert outcomes.keys() == {"plan", "refused"}, outcomes


def _outcome(path: Path, graph: Graph) -> str:
    try:
        plan, source = read_plan(path)
        found = re_estimated(plan, graph, EXACT, spec=tiny_spec(graph.name), source=source)
    except PlannerError as error:
        return "refused" if error.rule and error.remedy else f"no remedy: {error}"
    assert not found.edited
    assert re_estimated(found, graph, EXACT).to_yaml() == found.to_yaml()
    assert arrangement_of(found, graph) == settled(graph, arrangement_of(plan, graph))
    return "plan"


_WORDS = (
    *("column", "row", "vocab", "replicate", "sequence", "features", "full", "selective", "none", "true", "auto"),
    *("zbv", "1f1b", "interleaved", "-1", "0", "1", "2", "3", "0-1", "1-2", "4-5", "[]", "{}", "1e9", "*"),
)


def _scribbled(draw: random.Random, text: str) -> str:
    """The text with a value exchanged, a line gone, doubled or moved, a number or a letter changed."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("stages:"))
    for _ in range(draw.randint(1, 2)):
        place = draw.randrange(start, len(lines)) if draw.random() < 0.7 else draw.randrange(len(lines))
        line, kind = lines[place], draw.randrange(6)
        if kind == 0:
            lines[place] = ""
        elif kind == 1:
            lines.insert(place, line)
        elif kind == 2 and ":" in line:
            head, _, tail = line.rpartition(": ")
            lines[place] = f"{head}: {draw.choice(_WORDS)}" + ("}" if tail.endswith("}") else "")
        elif kind == 3:
            digits = [index for index, letter in enumerate(line) if letter.isdigit()]
            if digits:
                index = draw.choice(digits)
                lines[place] = line[:index] + draw.choice("0123459") + line[index + 1 :]
        elif kind == 4 and line:
            index = draw.randrange(len(line))
            lines[place] = line[:index] + draw.choice("abx:{}[]- .,0'\"") + line[index + 1 :]
        else:
            words = [
                word for word in ("column", "replicate", "row", "full", "selective", "sequence") if word in line
            ]
            if words:
                lines[place] = line.replace(draw.choice(words), draw.choice(_WORDS), 1)
    return "\n".join(lines) + "\n"

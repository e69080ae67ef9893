"""Plans made small: which axes stay, that they can run, and that they compute what one process does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from planner.errors import PlannerError
from planner.execute.local_world import RankFailed, run_locally
from planner.execute.numerics import verify_numerics
from planner.execute.shrink import shrunk
from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.strategy import Strategy
from planner.spec.verification import Parity, ValueCheck
from planner.spec.workload import TrainWorkload
from tests.cost.training_cases import tiny
from tests.search.arrangements import arranged, planned
from tests.tiny import tiny_spec


def made(name: str, keys: dict[str, Any], *, layers: int, **more: Any) -> tuple[Plan, ModelSpec]:
    """A plan of a model that is not as small as it could be."""
    strategy = Strategy.from_dict(keys)
    work = TrainWorkload(seq_len=64, global_batch=strategy.dp * strategy.pp * 4, precision="bf16")
    graph = tiny(name, layers)
    return planned(graph, arranged(graph, keys, **more), work), tiny_spec(name, layers=layers)


SHRUNK: dict[str, tuple[str, int, dict[str, Any], dict[str, int]]] = {
    "all that fit": ("llama", 8, {"tp": 4, "pp": 4, "dp": 8, "zero": 3, "sp": True}, {"tp": 2, "pp": 2, "dp": 2}),
    "copies of shards": ("gpt", 2, {"dp": 16, "dp_replicate": 4, "zero": 2}, {"dp": 4, "dp_replicate": 2}),
    "experts": ("mixtral", 2, {"ep": 8, "dp": 16, "zero": 1}, {"ep": 2}),
    "virtual stages": ("llama", 8, {"pp": 4, "vpp": 2, "dp": 4, "schedule": "zbv"}, {"pp": 2, "vpp": 2}),
    "latent attention": (
        "deepseek",
        4,
        {"tp": 2, "cp": 4, "ep": 4, "dp": 4, "zero": 1},
        {"tp": 2, "cp": 2, "ep": 2},
    ),
    "as it is": ("llama", 3, {"tp": 2, "pp": 3}, {"tp": 2, "pp": 3}),
}


@pytest.mark.parametrize("case", SHRUNK)
def test_a_small_copy_keeps_its_axes_and_can_run(case: str) -> None:
    name, layers, keys, wanted = SHRUNK[case]
    plan, spec = made(name, keys, layers=layers)
    small, model = shrunk(plan, spec, 8)
    strategy = small.strategy
    assert strategy.gpus <= 8
    assert {key: getattr(strategy, key) for key in wanted} == wanted
    assert (strategy.zero, strategy.sp, strategy.order) == (
        plan.strategy.zero,
        plan.strategy.sp,
        plan.strategy.order,
    )
    assert not violations(model, small.workload, strategy, small.gpus)
    assert model.layers == sum(len(span) for _, _, span in small.virtual_stages())
    assert model.hidden < spec.hidden
    assert {line.split for line in small.modules.values()} == {line.split for line in plan.modules.values()}


def test_every_layout_of_a_layer_stays() -> None:
    words = {1: "none", 2: "full", 3: "none", 4: "selective", 5: "none", 6: "none"}
    plan, spec = made("llama", {"tp": 8, "dp": 2}, layers=6, words=words)
    small, model = shrunk(plan, spec, 2)
    found = [small.recompute_of(f"blocks.{layer}") for layer in range(model.layers)]
    assert found == ["none", "full", "selective"]
    assert model.kv_heads == 1  # two heads for eight ranks were copies, and are


@pytest.mark.slow
def test_a_small_copy_computes_what_one_process_does() -> None:
    plan, spec = made("mixtral", {"tp": 8, "pp": 2, "ep": 4, "sp": True, "dp": 2, "zero": 1}, layers=2)
    found = verify_numerics(*shrunk(plan, spec, 4))
    assert found.differences == ()
    assert 0.0 < found.worst < found.tolerance
    assert (found.processes, found.strategy.tp, found.strategy.pp) == (4, 2, 2)
    what = [value.what for value in found.values]
    assert what[0] == "loss"
    assert "gradient of blocks.0.ffn.experts.up" in " ".join(what)
    assert len(what) == len(set(what)) == 1 + 2 * sum("AdamW" in text for text in what)


@pytest.mark.slow
def test_a_small_copy_of_a_module_of_the_library() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    plan, spec = made("gpt", {"tp": 2, "pp": 2, "sp": True}, layers=2)
    found = verify_numerics(*shrunk(plan, spec, 4), model_type="gpt2")
    assert found.differences == ()
    what = [value.what for value in found.values]
    assert what[:2] == ["loss", "gradient of transformer.wte.weight"]
    assert "gradient of transformer.h.1.attn.c_attn.weight" in what


def test_the_first_difference_is_named() -> None:
    values = (ValueCheck(what="loss", error=1e-12), ValueCheck(what="gradient of norm.weight", error=0.5))
    parity = Parity(processes=2, strategy=Strategy(dp=2), layers=2, tolerance=1e-10, values=values)
    assert parity.differences == ("gradient of norm.weight: 0.5 from that of one process",)
    lost = replace(parity, values=(ValueCheck(what="loss", error=float("inf")),))
    assert lost.differences[0].startswith("loss: inf")


@pytest.mark.slow
def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RankFailed, match="every process runs the step") as failed:
        run_locally(2, _fail, "error", seconds=600)
    assert failed.value.exit_code == 1
    assert "rank 1: ValueError: as asked" in str(failed.value), "not rank 0, which waits for it"
    with pytest.raises(PlannerError, match="some rule") as refused:
        run_locally(1, _fail, "refused", seconds=60)
    assert (refused.value.exit_code, refused.value.remedy) == (2, "mend it")


def _fail(how: str) -> None:
    if how == "refused":
        raise PlannerError("some rule", remedy="mend it")
    if dist.get_rank() == 0:
        time.sleep(600)
    raise ValueError("as asked")

"""What a run is asked for, and what weights are exported with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from planner.errors import PlannerError
from planner.execute.job import open_job, require_kernels
from planner.execute.trained import TrainedSpec
from planner.spec.huggingface_config import config_from_spec
from planner.spec.training_run import TrainingRun
from tests.execute.training import plan_for
from tests.tiny import tiny_spec


def test_a_configuration_that_is_there_goes_before_one_that_is_made(tmp_path: Path) -> None:
    spec = tiny_spec("llama")

    def config_for(model: str, weights: str | None) -> dict[str, Any]:
        told = SimpleNamespace(spec=spec, plan=SimpleNamespace(model=model), run=SimpleNamespace(weights=weights))
        return TrainedSpec.export_config(cast("TrainedSpec", told))

    assert config_for("tiny", None) == config_from_spec(spec)
    given = {"model_type": "llama", "architectures": ["Theirs"]}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert config_for("tiny", str(tmp_path)) == config_for(str(tmp_path), None) == given


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_a_run_cannot_compute_in_is_refused(tmp_path: Path, precision: str) -> None:
    path = tmp_path / "plan.yaml"
    plan_for(tiny_spec("gpt", layers=2), 4).save(path)
    path.write_text(path.read_text().replace("precision: fp32", f"precision: {precision}"))
    with pytest.raises(PlannerError, match=f"computes in bf16 or fp32; {precision} needs") as caught:
        open_job(path, TrainingRun())
    assert caught.value.exit_code == 2


def test_a_plan_for_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    plan_for(tiny_spec("bert"), 4).save(tmp_path / "plan.yaml")
    with pytest.raises(PlannerError, match="the executor runs decoders"):
        open_job(tmp_path / "plan.yaml", TrainingRun())


def test_a_ring_is_refused_where_attention_is_not_plain(tmp_path: Path) -> None:
    """Before a rank starts; where keys and values are gathered, everything runs."""
    path = tmp_path / "plan.yaml"
    plan_for(tiny_spec("bloom", layers=2), 4, gpus=2, cp=2).save(path)
    open_job(path, TrainingRun())
    with pytest.raises(PlannerError, match="torch's ring attention has no slopes") as caught:
        open_job(path, TrainingRun(context="ring"))
    assert (caught.value.value, caught.value.exit_code) == ("positions alibi", 2)
    assert "--context gather" in caught.value.remedy


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_ring_on_a_gpu_is_one_of_half_precision(tmp_path: Path, dtype: Literal["fp32", "fp64"]) -> None:
    path = tmp_path / "plan.yaml"
    plan_for(tiny_spec("llama", layers=2), 4, gpus=2, cp=2).save(path)
    job = open_job(path, TrainingRun(context="ring", dtype=dtype))
    require_kernels(job, "cpu")
    with pytest.raises(PlannerError, match="compute in bf16 or fp16") as caught:
        require_kernels(job, "cuda")
    assert caught.value.value == dtype

"""The table of published steps agrees with itself: sizes, layouts, and figures found in two places."""

from __future__ import annotations

import pytest

from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.strategy import Strategy
from planner.spec.workload import workload_from_dict
from tests.cost.published import A100_PEAK_TFLOPS, KORTHIKANTI_UTILISATION, PUBLISHED, Published

each = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)


def test_the_table_is_small_and_names_are_its_own() -> None:
    assert len(PUBLISHED) <= 40
    assert len({row.name for row in PUBLISHED}) == len(PUBLISHED)


@each
def test_it_can_run_as_written(row: Published) -> None:
    model = ModelSpec.from_dict(row.model)
    strategy = Strategy.from_dict(row.strategy, gpus=row.gpus)
    assert violations(model, workload_from_dict(row.workload), strategy, row.gpus) == ()
    assert row.citation


@each
def test_its_shape_has_the_published_size(row: Published) -> None:
    """Parameters of a GPT, Narayanan et al. 2021, eq. 2: 12Lh²(1 + 13/12h + (V + s)/12Lh)."""
    if not row.billions or row.model.get("kv_heads"):
        return
    h, layers, vocab = (float(row.model[key]) for key in ("hidden", "layers", "vocab"))
    positions = 0.0 if row.model.get("positions") else float(row.workload["seq_len"])
    found = 12 * layers * h**2 * (1 + 13 / (12 * h) + (vocab + positions) / (12 * layers * h))
    assert found / 1e9 == pytest.approx(row.billions, rel=0.03 if row.billions < 5 else 0.005)


@pytest.mark.parametrize("size", KORTHIKANTI_UTILISATION)
def test_seconds_and_utilisation_tell_the_same(size: str) -> None:
    (row,) = [row for row in PUBLISHED if row.name == f"Megatron {size}, selective recompute"]
    share = row.flops / (row.step_seconds * row.gpus * A100_PEAK_TFLOPS * 1e12)
    assert share == pytest.approx(KORTHIKANTI_UTILISATION[size], rel=0.01)


def test_blooms_log_line_has_the_rate_it_prints() -> None:
    """The log prints 149.77 TFLOP/s, recompute counted."""
    (fastest,) = [row for row in PUBLISHED if row.name == "BLOOM, fastest configuration"]
    (step,) = [row for row in PUBLISHED if row.name == "BLOOM, a step of the final run"]
    assert fastest.flops / (step.step_seconds * 384e12) == pytest.approx(149.77, rel=0.01)


def test_steps_are_as_long_as_the_rates_say() -> None:
    seconds = {row.name: row.step_seconds for row in PUBLISHED}
    # 96·512·2048·24·2304²·(1 + 2048/13824 + 51200/884736) FLOPs at 32·137 TFLOP/s
    assert seconds["Megatron 1.7B"] == pytest.approx(3.53, rel=0.01)
    assert seconds["Megatron 1T"] == pytest.approx(102.0, rel=0.02)

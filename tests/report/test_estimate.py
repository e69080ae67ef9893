"""An estimate on the screen: the verdict first, every part named, and no width, size or name that breaks it."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from typing import Any

import pytest

import planner
from planner.report.estimate import show_estimate
from planner.spec.estimate import Estimate, Interval, Memory, StepTime
from planner.spec.remedy import Remedy
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from planner.units import GIB
from tests.report.made_up_runs import made_up_estimate

PROFILE = planner.load_hardware("dgx-h100")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(found: Estimate, monkeypatch: pytest.MonkeyPatch, width: int = 100, **more: Any) -> str:
    """What a terminal of that width shows."""
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", screen)
        show_estimate(found, PROFILE, **{"model": "m", "hardware": "dgx-h100", **more})
    return screen.getvalue()


def made(memory: tuple[float, ...] = (40.0,), high: float = 1.1, **keys: Any) -> Estimate:
    """An estimate of stages that take so many GiB, on GPUs of 80 GiB, eight in all."""
    layout = Strategy(pp=len(memory), dp=max(1, 8 // len(memory)))
    stages = tuple(Memory(weights_bytes=size * GIB) for size in memory)
    plain = made_up_estimate(2.0, waits=0.5)
    top = max(memory) * GIB
    known = replace(plain.uncertainty, memory_bytes=Interval(low=0.9 * top, high=high * top))
    return replace(plain, strategy=layout, gpus=layout.gpus, memory_per_stage=stages, uncertainty=known,
                   capacity_bytes=80.0 * GIB, **keys)  # fmt: skip


def test_the_verdict_stands_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, *_ = shown(made(), monkeypatch).splitlines()
    assert first == "Fits: 40.0 of 80.0 GiB, up to 44.0"
    assert second == "2.00 s/step, 1.80 to 2.20 in 80 % of such runs   1 tokens/s/GPU   MFU 40.0 %"
    assert third.startswith(
        "m on 8 GPUs of dgx-h100: dp8, 4 microbatches of 1, no recompute; 32 × 1,024 tokens in bf16"
    )


def test_out_of_memory_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    over = shown(made((90.0, 100.0)), monkeypatch).splitlines()[0]
    assert over == "Does not fit: 100.0 of 80.0 GiB on stage 1, 20.0 GiB too much, up to 30.0"
    doubtful = shown(made((75.0,)), monkeypatch).splitlines()[0]
    assert doubtful == "May not fit: 75.0 of 80.0 GiB, up to 82.5, which is 2.5 GiB too much"


def test_parts_of_the_step_have_bars_shares_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(made(), monkeypatch).splitlines()
    products = next(line.split() for line in lines if line.startswith("matrix products"))
    exposed = next(line.split() for line in lines if line.startswith("tp exposed"))
    assert products[2] == "1.500"
    assert products[4:6] == ["75", "%"]
    assert products[-1] == PROFILE.gemm_for("bf16").source
    assert exposed[2] == "0.500"
    assert len(products[3]) == pytest.approx(3 * len(exposed[3]), abs=2)
    assert any(line.split() == ["a", "step", "2.000"] for line in lines)


def test_small_parts_share_a_row_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    step = StepTime(matmul_seconds=10.0, bubble_seconds=2.0, host_seconds=0.01, pp_seconds=0.02, cp_seconds=0.03)
    text = shown(made(breakdown=step), monkeypatch, width=120)
    (row,) = [line for line in text.splitlines() if "waiting for the host" in line]
    assert "cp exposed, pp exposed, waiting for the host" in row
    assert "0.06" in row
    assert "mixed" in row
    assert "formula" in next(line for line in text.splitlines() if line.startswith("bubble"))
    table = text.split("time ")[1].split("\n\n")[0]
    seconds = [float(found) for found in re.findall(r"(?<=\s)\d+\.\d+(?=\s)", table)]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.02)


def test_every_stage_of_a_few_and_the_ends_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    few = shown(made((40.0, 30.0, 20.0, 10.0)), monkeypatch)
    assert [f"stage {place} " in few for place in range(4)] == [True] * 4
    many = shown(made(tuple(20.0 + 30.0 * (place == 5) + place / 4 for place in range(64))), monkeypatch)
    rows = [line.split("  ")[0] for line in many.splitlines() if re.match(r"stage \d+(,| {2})|\d+ others", line)]
    assert rows == ["stage 5, fullest", "stage 0", "stage 63", "61 others"]
    assert "20.2–35.5" in many


def test_a_bar_ends_at_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def bar(memory: float) -> str:
        text = shown(made((memory,)), monkeypatch)
        return next(line.split()[3] for line in text.splitlines() if line.startswith("each GPU  "))

    assert bar(40.0) == "█" * 20 + "·" * 20 + "|"
    assert bar(80.0) == "█" * 40 + "|"
    assert bar(160.0) == "█" * 20 + "|" + "█" * 20


def test_parts_of_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(**{part: (place + 1) * GIB for place, part in enumerate(Memory().parts)})
    text = shown(replace(made(), memory_per_stage=(memory,)), monkeypatch, width=120)
    told = text.split("each GPU in GiB:")[1].split("\n\n")[0].replace("\n", " ")
    for place, part in enumerate(memory.parts):
        assert re.search(rf"{part.removesuffix('_bytes').replace('_', ' ')}\s+{place + 1}\.0", told), part
    row = next(line.split() for line in text.splitlines() if line.startswith("each GPU  "))
    assert row[-4:] == ["6.0", "4.0", "45.0", "23.0"]  # 1+2+3, 4, 5+…+10, 11+12
    assert row[2] == "78.0"


def test_intervals_and_what_they_rest_on(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(made(), monkeypatch, width=120)
    assert (
        "Intervals hold 80 % of the published runs most like this (made up): "
        "step 1.80 to 2.20 s, memory 36.0 to 44.0" in text
    )
    assert "rests on numbers that are 100 % assumed" in text


def test_warnings_and_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = replace(made().uncertainty, sources=replace(made().uncertainty.sources, assumed=0.2, measured=0.8))
    found = replace(made(warnings=("watch out", "and this")), uncertainty=sure)
    text = shown(found, monkeypatch)
    assert "\n! watch out\n! and this\n" in text
    assert text.endswith("\nNext: tp-plan explain m --microbatch 1 --seq-len 1024\n")
    assert shown(made(), monkeypatch).endswith("\nNext: tp-plan explain dgx-h100\n"), "most of it is assumed"
    assert shown(made((99.0,)), monkeypatch).endswith("\nNext: tp-plan list hardware\n")


def remedy(flags: str, seconds: float, **strategy: Any) -> Remedy:
    return Remedy(flags=flags, strategy=Strategy.from_dict(strategy, gpus=8), step_seconds=seconds,
                  memory_bytes=50 * GIB, memory_high_bytes=60 * GIB)  # fmt: skip


def test_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [remedy("--recompute full", 2.5, recompute="full"), remedy("--zero 1", 2.0, zero=1),
             remedy("--zero 3", 1.5, zero=3), remedy("--cp 2", 5.0, cp=2)]  # fmt: skip
    text = shown(made((99.0,)), monkeypatch, remedies=found, model="a model.yaml")
    rows = [" ".join(line.split()) for line in text.split("Would fit with")[1].splitlines()[3:7]]
    assert rows == [
        "--recompute full 50.0 60.0 2.50 25 % slower",
        "--zero 1 50.0 60.0 2.00 as fast",
        "--zero 3 50.0 60.0 1.50 25 % faster",
        "--cp 2 50.0 60.0 5.00 2.5x slower",
    ]
    command = "tp-plan estimate 'a model.yaml' --hardware dgx-h100 --gpus 8 --recompute full"
    assert f"Next: {command} --seq-len 1024 --global-batch 32" in text
    assert "No change that was tried" in shown(made((99.0,)), monkeypatch, remedies=[])
    assert "No change that was tried" not in shown(made((99.0,)), monkeypatch)


EXTREMES = {
    "a long name": made(model="x" * 200, hardware="y" * 200),
    "a nanosecond": replace(made(), breakdown=StepTime(matmul_seconds=3e-9)),
    "a millisecond": replace(made(), breakdown=StepTime(matmul_seconds=4.2e-3, dp_seconds=1e-7)),
    "a year": replace(made(), breakdown=StepTime(matmul_seconds=3.2e7, host_seconds=1.0)),
    "a petabyte": made((1e6,)),
    "a byte": made((1e-9,)),
    "huge rates": made(tokens_per_second_per_gpu=9.9e12, mfu=42.0),
    "tiny rates": made(tokens_per_second_per_gpu=0.0, mfu=0.0),
    "64 stages": made(tuple(map(float, range(1, 65)))),
    "one GPU": replace(made(), strategy=Strategy(), gpus=1),
    "a million GPUs": replace(made(), strategy=Strategy(dp=1_000_000), gpus=1_000_000,
                              workload=TrainWorkload(seq_len=10**9, global_batch=10**9, precision="bf16")),
    "a long warning": made(warnings=("word " * 60,)),
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", EXTREMES)
def test_nothing_breaks_the_layout(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(EXTREMES[name], monkeypatch, width)
    lines = [line for line in text.splitlines() if not line.startswith("Next: ")]
    assert max(map(len, lines)) <= width
    assert "nan" not in text
    assert "e+" not in text
    assert text.splitlines()[0].startswith(("Fits", "May not", "Does not"))


def test_units_follow_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "4.20 ms/step" in shown(EXTREMES["a millisecond"], monkeypatch)
    assert "3.00 ns/step" in shown(EXTREMES["a nanosecond"], monkeypatch)
    assert "32,000,001 s/step" in shown(EXTREMES["a year"], monkeypatch)


def test_bars_can_be_written_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Screen, "encoding", "ascii")
    text = shown(made(), monkeypatch)
    assert "█" not in text
    assert "#" * 20 + "." * 20 + "|" in text

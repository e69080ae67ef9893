"""`planner.plan` and what stands around it: what is asked, what a plan keeps, and that plans open again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import planner
from planner import api
from planner.api.asked import bytes_of, gpu_counts, gpu_range, usual_batch, wishes_of
from planner.api.commands import command_of, wishes_in
from planner.spec.strategy import Overlap
from planner.spec.wishes import Fix, Wishes
from planner.spec.yaml_text import dump_yaml
from planner.units import GIB
from tests.spec.test_measured import RUN
from tests.tiny import tiny_spec

WORK = {"seq_len": 256, "global_batch": 32}
SMALL = tiny_spec("llama", layers=4, max_positions=512)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A spec file of a small model."""
    path = tmp_path / "small.yaml"
    path.write_text(dump_yaml(SMALL.to_dict()))
    return str(path)


@pytest.mark.parametrize(
    ("given", "ends"), [(8, (8, 8)), ("8", (8, 8)), ("8..64", (8, 64)), ((2, 4), (2, 4)), ([2, 4], (2, 4))]
)
def test_a_count_or_a_range_of_gpus(given: Any, ends: tuple[int, int]) -> None:
    assert gpu_range(given) == ends


@pytest.mark.parametrize(
    "given", [0, -1, 10**9, "0", "4..2", "x", "1..2..3", "", (1, 2, 3), (1,), 2.0, True, None]
)
def test_other_counts_are_refused(given: Any) -> None:
    with pytest.raises(planner.PlannerError) as caught:
        gpu_range(given)
    assert (caught.value.key, caught.value.exit_code) == ("gpus", 2)


def test_the_counts_of_a_range() -> None:
    profile = planner.load_hardware("dgx-h100")
    assert gpu_counts(profile, 1, 8) == (1, 2, 4, 8)
    assert gpu_counts(profile, 3, 42) == (3, 4, 8, 16, 24, 32, 40, 42)
    assert gpu_counts(profile, 12, 12) == (12,)
    assert {9, 64, 72, 144, 128} < set(gpu_counts(planner.load_hardware("gb200-nvl72"), 8, 144))


@pytest.mark.parametrize("gpus", [*range(1, 65), 96, 257, 1000, 1536])
def test_the_batch_left_out_suits_the_gpus(gpus: int) -> None:
    batch = usual_batch(gpus, Fix())
    odd = gpus // (gpus & -gpus)
    assert batch % odd == 0
    assert batch == 256 if odd == 1 else abs(batch - 256) <= max(96, odd - 256)
    assert usual_batch(gpus, Fix(dp=12, microbatch=2)) % 24 == 0


def test_any_count_of_gpus_can_run_what_is_left_out(model: str) -> None:
    for gpus in (1, 3, 7):
        assert planner.plan(model, "dgx-h100", gpus, fix={"dp": gpus}).strategy.dp == gpus


@pytest.mark.parametrize(
    ("text", "size"), [("70GiB", 70 * GIB), ("70 GiB", 70 * GIB), ("0.5TiB", 512 * GIB), ("80GB", 80e9)]
)
def test_memory_as_text(text: str, size: float) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["70", "GiB", "70 Gib", "-1GiB", "0GiB", "nanGiB", "1e99GiB", ""])
def test_memory_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(planner.PlannerError) as caught:
        wishes_of(None, {"max_memory": text})
    assert caught.value.key in ("max_memory", "max_memory_bytes")


def test_wishes_as_flags_and_by_their_own_keys() -> None:
    flags = {"max_memory": "70GiB", "no_recompute": True, "schedule": "1f1b", "minimize": "gpus", "deadline": 3.0,
             "time_limit": None, "price": None}  # fmt: skip
    keys = {"max_memory_bytes": 70 * GIB, "recompute": ["none"], "schedules": ["1f1b"], "minimize": "gpus",
            "deadline_seconds": 3.0}  # fmt: skip
    assert wishes_of("tp=2", flags) == wishes_of({"tp": 2}, keys) == wishes_of(Fix(tp=2), keys)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"max_memori": 1}, "max_memory"), ({"deadline": 1.0, "deadline_seconds": 1.0}, "keep one"),
     ({"minimize": "money"}, "step_seconds"), ({"solver": "cplex"}, "cbc"), ({"fix_": 1}, "max_memory")],
)  # fmt: skip
def test_unknown_wishes_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(planner.PlannerError) as caught:
        wishes_of(None, given)
    assert said in caught.value.remedy


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(),
        Wishes(fix=Fix(tp=2, sp=True, overlap=Overlap(dp=True, tp=False), order="tp-cp-pp-dp")),
        Wishes(max_memory_bytes=0.1 * GIB, memory_margin=0.05, time_limit_seconds=1e-3),
        Wishes(max_memory_bytes=1e-5 * GIB, recompute=("none",), schedules=("gpipe", "zb"), solver="cbc"),
        Wishes(recompute=("none", "full"), minimize="gpus", deadline_seconds=1.25),
        Wishes(minimize="cost_per_token", price_per_gpu_hour=2.5),
    ],
)
@pytest.mark.parametrize("by_keys", [False, True])
def test_a_command_says_all_wishes(wishes: Wishes, by_keys: bool) -> None:
    model = SMALL.to_dict() if by_keys else "gpt2"
    given = wishes.to_dict()
    asked = api.plan_request(model, "dgx-h100", (8, 16), WORK, given.pop("fix", None), **given)
    assert asked.wishes == wishes
    assert wishes_in(command_of(asked)) == wishes
    assert command_of(asked).startswith("planner.plan(" if by_keys else "tp-plan plan gpt2 --hardware dgx-h100")


@pytest.mark.parametrize(
    "command", ["tp-plan plan gpt2 --fix 'tp=8", "planner.plan(fix={", "planner.plan(fix=f())"]
)
def test_a_command_that_was_broken_is_refused(command: str) -> None:
    with pytest.raises(planner.PlannerError) as caught:
        wishes_in(command)
    assert caught.value.key == "command"


def test_other_commands_hold_nothing() -> None:
    assert wishes_in("tp-plan import megatron.sh --fix tp=8") == Wishes()


def test_a_plan_is_proven_and_keeps_to_what_is_asked(model: str) -> None:
    plan = planner.plan(model=model, hardware="dgx-h100", gpus=8, workload=WORK, fix={"tp": 2, "pp": 2})
    assert (plan.strategy.tp, plan.strategy.pp, plan.gpus, plan.model) == (2, 2, 8, model)
    assert plan.workload.seq_len == 256
    assert plan.certificate is not None
    assert plan.certificate.gap == 0.0
    assert plan.certificate.objective == pytest.approx(plan.estimate.step_seconds, rel=1e-12)
    free = planner.plan(model=model, hardware="dgx-h100", gpus=8, workload=WORK)
    assert free.estimate.step_seconds <= plan.estimate.step_seconds
    assert free.certificate is not None
    assert free.certificate.candidates > plan.certificate.candidates
    assert all(other.strategy != free.strategy and other.reason for other in free.runners_up)


def test_the_best_of_several_counts(model: str) -> None:
    alone = [planner.plan(model, "dgx-h100", gpus, WORK).estimate.step_seconds for gpus in (1, 2, 4)]
    assert planner.plan(model, "dgx-h100", (1, 4), WORK).estimate.step_seconds == min(alone)
    deadline = max(alone) * (1 + 1e-9)
    fewest = planner.plan(model, "dgx-h100", "1..4", WORK, minimize="gpus", deadline=deadline)
    assert fewest.gpus == next(gpus for gpus, step in zip((1, 2, 4), alone, strict=True) if step <= deadline)


def test_many_plans_in_one_process_do_not_influence_one_another(model: str) -> None:
    def made(**keys: Any) -> str:
        return planner.plan(model, "dgx-h100", 2, WORK, **keys).to_yaml()

    first = made()
    others = [made(fix={"tp": 2}), made(no_recompute=True), made(max_memory="8GiB")]
    assert [made(fix="tp=2"), made(recompute=["none"]), made(max_memory_bytes=8 * GIB)] == others
    assert made() == first


def test_a_plan_opens_again(model: str, tmp_path: Path) -> None:
    plan = planner.plan(model, "dgx-h100", 8, WORK, {"pp": 2})
    plan.save(tmp_path / "plan.yaml")
    assert planner.load_plan(tmp_path / "plan.yaml") == plan
    opened = api.open_plan(tmp_path / "plan.yaml")
    assert (opened.plan, opened.edited) == (plan, False)
    anew = api.open_plan(plan, again=True)
    assert anew.plan.estimate == plan.estimate
    assert anew.plan.certificate is None


def test_a_model_and_hardware_given_by_keys_are_kept(tmp_path: Path) -> None:
    hardware = {"base": "dgx-h100", "set": {"inter_node_bandwidth": "0.5x"}}
    plan = planner.plan(SMALL.to_dict(), hardware, 4, WORK)
    assert plan.model_spec == SMALL
    assert plan.hardware_profile == planner.load_hardware(hardware)
    plan.save(tmp_path / "plan.yaml")
    assert api.open_plan(tmp_path / "plan.yaml").plan == plan
    again = eval(plan.command, {"planner": planner})
    assert again.to_yaml() == plan.to_yaml()


def test_bundled_ones_are_called_by_their_names() -> None:
    asked = api.plan_request(planner.load_model("gpt2"), planner.load_hardware("dgx-h100"), 8, WORK)
    assert command_of(asked).startswith("tp-plan plan gpt2 --hardware dgx-h100 --gpus 8 ")


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    place = Path(__file__).resolve().parent / "examples" / "own_model.py"
    plan = planner.plan(f"{place}:make", "dgx-h100", 2, {"seq_len": 64, "global_batch": 8})
    assert plan.model == f"{place}:make"
    assert plan.strategy.tp == 1
    assert plan.model_spec is None
    plan.save(tmp_path / "plan.yaml")
    assert api.open_plan(tmp_path / "plan.yaml").plan == plan


def test_a_model_that_changed_is_refused(model: str, tmp_path: Path) -> None:
    planner.plan(model, "dgx-h100", 2, WORK).save(tmp_path / "plan.yaml")
    Path(model).write_text(dump_yaml({**SMALL.to_dict(), "layers": 5}))
    with pytest.raises(planner.PlannerError) as caught:
        api.open_plan(tmp_path / "plan.yaml")
    assert caught.value.key == "digests.model"
    assert caught.value.where.startswith(str(tmp_path / "plan.yaml"))
    Path(model).unlink()
    with pytest.raises(planner.PlannerError) as caught:
        api.open_plan(tmp_path / "plan.yaml")
    assert caught.value.where.startswith(str(tmp_path / "plan.yaml"))


def test_hardware_that_changed_is_refused(model: str, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("base: dgx-h100\nset: {device.memory_gib: 40}\n")
    plan = planner.plan(model, str(profile), 2, WORK)
    profile.write_text("base: dgx-h100\nset: {device.memory_gib: 20}\n")
    with pytest.raises(planner.PlannerError) as caught:
        api.open_plan(plan)
    assert caught.value.key == "digests.hardware"


def test_nothing_fits(model: str) -> None:
    with pytest.raises(planner.PlannerError) as caught:
        planner.plan(model, "dgx-h100", 2, WORK, max_memory="1GiB")
    told = caught.value
    assert (told.exit_code, told.key) == (1, "memory")
    assert str(told).startswith("error[memory]: no layout fits 1 GiB on 2 GPUs\n  closest: ")
    assert "\n  fix: " in str(told)
    assert told.to_dict()["misfit"]["capacity_bytes"] == 1.0 * GIB  # type: ignore[call-overload, index]


def _interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_gives_the_best_so_far_with_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.search.optimize._BATCH", 8)
    whole = planner.plan("gpt2", "dgx-h100", 16)
    plan = planner.plan("gpt2", "dgx-h100", 16, progress=_interrupt)
    assert whole.certificate is not None
    assert plan.certificate is not None
    assert plan.certificate.gap > 0.0
    assert plan.certificate.bound <= whole.certificate.objective <= plan.certificate.objective
    assert plan.certificate.solved < whole.certificate.solved
    assert plan.estimate.fits


def test_an_interrupt_before_there_is_any(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.search.optimize.bounds", _raising(KeyboardInterrupt()))
    with pytest.raises(planner.PlannerError) as caught:
        planner.plan(model, "dgx-h100", 2, WORK)
    assert caught.value.exit_code == 1
    assert "interrupted before" in caught.value.rule


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"gpus": 10_000_000}, "gpus"),
        ({"fix": {"tpp": 8}}, "tpp"),
        ({"fix": {"tp": 0}}, "tp"),
        ({"workload": {"mode": "serve"}}, "mode"),
        ({"workload": {"seq_len": 0}}, "seq_len"),
        ({"minimize": "gpus"}, "deadline_seconds"),
        ({"hardware": "dgx-h10"}, "hardware"),
        ({"model": "llama3.1-8"}, "model"),
    ],
)
def test_bad_input(keys: dict[str, Any], key: str) -> None:
    given: dict[str, Any] = {"model": "gpt2", "hardware": "dgx-h100", "gpus": 8}
    with pytest.raises(planner.PlannerError) as caught:
        planner.plan(**(given | keys))
    assert caught.value.key.endswith(key)
    assert caught.value.exit_code == 2


def test_more_gpus_than_the_profile_has(model: str, tmp_path: Path) -> None:
    profile = tmp_path / "two.yaml"
    levels = list(planner.load_hardware("t4-pcie").topology)
    profile.write_text(f"base: t4-pcie\nset: {{topology.{levels[-1]}.gpus: 16}}\n")
    with pytest.raises(planner.PlannerError) as caught:
        planner.plan(model, str(profile), "8..32")
    assert (caught.value.key, caught.value.exit_code) == ("gpus", 2)


def test_comparing_in_python(model: str, tmp_path: Path) -> None:
    best = planner.plan(model, "dgx-h100", 4, WORK)
    other = planner.plan(model, "dgx-h100", 4, WORK, {"pp": 2})
    other.save(tmp_path / "other.yaml")
    entries = planner.compare([best, str(tmp_path / "other.yaml")], tmp_path / "report.html")
    assert [entry.name for entry in entries] == ["A", str(tmp_path / "other.yaml")]
    assert [entry.timeline is not None for entry in entries] == [best.strategy.pp > 1, True]
    assert (tmp_path / "report.html").read_text().lower().startswith("<!doctype html")
    with pytest.raises(planner.PlannerError):
        planner.compare([])


@pytest.mark.parametrize(("stack", "compiled"), [("eager", True), ("compiled", False)])
def test_a_profile_is_not_refined_by_a_run_of_other_software(
    model: str, tmp_path: Path, stack: str, compiled: bool
) -> None:
    plan = planner.plan(model, "dgx-h100", 2, workload={**WORK, "stack": stack}, fix={"dp": 2})
    plan.save(tmp_path / "plan.yaml")
    run = dataclasses.replace(RUN, layout=plan.layout_digest, workload=plan.workload, compiled=compiled)
    run.save(tmp_path / "measured.json")
    with pytest.raises(planner.PlannerError, match="refined by runs of it") as caught:
        api.refine([tmp_path / "measured.json"])
    assert f"plan with --stack {'compiled' if compiled else 'eager'}" in caught.value.remedy


def test_a_profile_is_not_refined_by_a_run_whose_keys_went_around_a_ring(model: str, tmp_path: Path) -> None:
    plan = planner.plan(model, "dgx-h100", 2, workload=WORK, fix={"cp": 2})
    plan.save(tmp_path / "plan.yaml")
    run = dataclasses.replace(RUN, layout=plan.layout_digest, workload=plan.workload, strategy=plan.strategy)
    dataclasses.replace(run, context="ring").save(tmp_path / "measured.json")
    with pytest.raises(planner.PlannerError, match="runs of what their plans predict") as caught:
        api.refine([tmp_path / "measured.json"])
    assert "--context gather" in caught.value.remedy

"""`tp-plan estimate` from flags to answer: text, JSON, file, errors, exit codes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import planner
from planner.spec.estimate import Estimate
from planner.spec.files import read_yaml
from planner.spec.yaml_text import dump_yaml
from tests.command_line import tp_plan
from tests.report.test_terminal import on_a_terminal
from tests.tiny import tiny_spec

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A spec file of a small model."""
    path = tmp_path / "small.yaml"
    path.write_text(dump_yaml(tiny_spec("llama", max_positions=512).to_dict()))
    return str(path)


@pytest.fixture
def run(model: str) -> Run:
    """`tp-plan estimate` of the small model on so many H100: its exit code, output and errors."""

    def call(*arguments: str, gpus: int = 8, hardware: str = "dgx-h100", of: str = model) -> tuple[int, str, str]:
        told = tp_plan("estimate", of, "--hardware", hardware, "--gpus", str(gpus), *arguments)
        return told.returncode, told.stdout, told.stderr

    return call


@pytest.fixture
def crowded(tmp_path: Path) -> str:
    """A cluster whose GPUs have next to no memory."""
    path = tmp_path / "crowded.yaml"
    path.write_text("base: dgx-h100\nset: {device.memory_gib: 0.5}\n")
    return str(path)


def test_it_fits(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out.startswith("Fits: ")
    assert "8 GPUs of dgx-h100: dp8, 32 microbatches of 1, no recompute; 256 × 512 tokens in bf16, eager" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 120


def test_json_is_the_estimate(run: Run, model: str) -> None:
    code, out, _ = run("--json", "--tp", "2", "--sp", "--zero", "1", "--global-batch", "64")
    told = json.loads(out)
    expected = planner.estimate(model, "dgx-h100", 8, {"global_batch": 64}, {"tp": 2, "sp": True, "zero": 1})
    assert code == 0
    assert Estimate.from_dict(told) == expected
    assert told == json.loads(json.dumps(expected.to_dict()))


def test_every_flag_reaches_the_estimate(run: Run, tmp_path: Path) -> None:
    experts = tmp_path / "experts.yaml"
    experts.write_text(dump_yaml(tiny_spec("mixtral", layers=8, max_positions=512).to_dict()))
    layout = {"tp": 2, "pp": 2, "dp": 4, "cp": 2, "ep": 2, "etp": 2, "vpp": 2, "microbatch": 2, "zero": 3,
              "dp_replicate": 2, "recompute": "selective", "schedule": "interleaved", "order": "cp-tp-pp-dp",
              "grad_dtype": "bf16", "overlap": "tp,ep,pp"}  # fmt: skip
    work = {"seq_len": 256, "global_batch": 128, "precision": "fp8", "optimizer": "sgd", "stack": "megatron",
            "imbalance": 1.5}  # fmt: skip
    words = [word for key, value in (layout | work).items() for word in (f"--{key.replace('_', '-')}", str(value))]
    _, out, _ = run(*words, "--sp", "--json", gpus=32, of=str(experts))
    told = Estimate.from_dict({key: value for key, value in json.loads(out).items() if key != "remedies"})
    strategy, workload = told.strategy, told.workload
    for key, value in layout.items():
        if key != "overlap":
            assert getattr(strategy, key) == value, key
    assert strategy.sp
    overlap = strategy.overlap
    assert (overlap.tp, overlap.dp, overlap.ep, overlap.pp) == (True, False, True, True)
    for key, value in work.items():
        assert getattr(workload, key) == value, key


def test_a_file_reads_back(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "estimate.yaml"
    code, out, err = run("-o", str(path), "--json")
    assert (code, err) == (0, f"wrote {path}\n")
    data, source = read_yaml(path)
    assert Estimate.from_dict(data, source) == Estimate.from_dict(json.loads(out))
    assert run("-q", "-o", str(path))[2] == ""


def test_what_does_not_fit_is_a_no(run: Run, crowded: str) -> None:
    code, out, err = run(hardware=crowded)
    assert (code, err) == (1, "")
    assert out.startswith("Does not fit: ")
    assert "GiB too much" in out
    code, out, _ = run("--json", hardware=crowded)
    assert code == 1
    assert json.loads(out)["fits"] is False


def test_a_batch_left_out_is_chosen_and_told(run: Run) -> None:
    code, out, _ = run(gpus=3)
    assert code == 0
    assert (
        "! global batch 255, the nearest to 256 that can run (dp·microbatch = 3 divides the global batch)" in out
    )
    told = json.loads(run("--json", gpus=3)[1])
    assert told["workload"]["global_batch"] == 255
    assert told["warnings"][0].startswith("global batch 255")


def test_a_batch_that_does_not_divide_names_the_nearest(run: Run) -> None:
    code, out, err = run("--global-batch", "100")
    assert (code, out) == (2, "")
    assert "error[global_batch]: dp·microbatch = 8 divides the global batch" in err
    assert "set global_batch to 96 or 104" in err
    error = json.loads(run("--global-batch", "100", "--json")[1])["error"]
    assert (error["key"], error["value"]) == ("global_batch", "100")


@pytest.mark.parametrize(
    ("arguments", "key", "said"),
    [
        (("--tp", "3"), "dp", "divides 8"),
        (("--tp", "8"), "tp", "set tp to 4"),
        (("--zero", "4"), "zero", "at most 3"),
        (("--tp", "0"), "tp", "at least 1"),
        (("--recompute", "ful"), "recompute", "did you mean full?"),
        (("--overlap", "tp,none"), "overlap", "did you mean none?"),
        (("--order", "tp-dp"), "order", "did you mean tp-dp-cp-pp?"),
        (("--precision", "fp9"), "precision", "did you mean fp"),
        (("--stack", "megatorn"), "stack", "did you mean megatron?"),
        (("--seq-len", "many"), "usage", "tp-plan estimate --help"),
        (("--imbalance", "nan"), "imbalance", "finite"),
        (("--gpus", "0"), "usage", "tp-plan estimate --help"),
        (("--hardware", "dgx-h1000"), "hardware", "did you mean dgx-h100?"),
        (("-o", "--json"), "usage", "tp-plan estimate --help"),
        (("-o", "/nowhere/estimate.yaml"), "", "/nowhere"),
    ],
)
def test_bad_input_is_exit_2(run: Run, arguments: tuple[str, ...], key: str, said: str) -> None:
    code, out, err = run(*arguments)
    if "--json" in arguments:
        err = out
    assert code == 2
    assert said in err
    assert f"[{key}]" in err or f'"key": "{key}"' in err or not key
    assert "Traceback" not in err


def test_an_unknown_model_is_exit_2(run: Run) -> None:
    code, _, err = run(of="llama3.1-70")
    assert code == 2
    assert "did you mean llama3.1-70b?" in err


def test_a_traced_graph_and_a_function_are_models_too(run: Run, repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    planner.trace("gpt2", output=path)
    for of in (str(path), "gpt2"):
        told = json.loads(run("--json", "--seq-len", "256", of=of)[1])
        assert told["model"] == "gpt2"
    own = f"{repository / 'tests' / 'examples' / 'own_model.py'}:make"
    code, out, err = run("--seq-len", "128", of=own)
    assert code == 0, err
    assert out.startswith("Fits")


def test_no_escape_codes_without_colour(model: str) -> None:
    words = ("estimate", model, "--hardware", "dgx-h100", "--gpus", "8")
    assert "\x1b" in on_a_terminal(*words)
    assert "\x1b" not in on_a_terminal(*words, NO_COLOR="1")


def test_numbers_agree_between_text_and_json(run: Run) -> None:
    told: dict[str, Any] = json.loads(run("--json")[1])
    _, out, _ = run()
    share = f"{told['mfu'] * 100:.1f}"
    assert f"MFU {'<0.1' if share == '0.0' else share} %" in out
    assert f"{told['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU" in out
    assert f"{told['memory_bytes'] / 2**30:.1f} of {told['capacity_bytes'] / 2**30:.1f} GiB" in out


def test_out_of_memory_says_what_would_fit(run: Run, model: str, tmp_path: Path) -> None:
    """The change that is told first, taken as it stands, fits and is estimated alike."""
    bare = {"memory.context_gib": 0.0, "memory.communicator_gib": 0.0}
    cluster = {"base": "dgx-h100", "set": bare}
    needed = planner.estimate(model, cluster, 8, {}, {"microbatch": 16}).uncertainty.memory_bytes.high / 2**30
    tight = tmp_path / "tight.yaml"
    tight.write_text(dump_yaml({"base": "dgx-h100", "set": bare | {"device.memory_gib": 0.95 * needed}}))
    code, out, _ = run("--microbatch", "16", hardware=str(tight))
    assert code == 1
    assert "\nWould fit with\n" in out
    command = shlex.split(out.rsplit("Next: ", 1)[1])
    assert command[:3] == ["tp-plan", "estimate", model]
    code, told, _ = run("--microbatch", "16", "--json", hardware=str(tight))
    remedies = json.loads(told)["remedies"]
    assert code == 1
    assert 1 <= len(remedies) <= 5
    assert remedies[0]["flags"] in out
    flags = dict(zip(command[3::2], command[4::2], strict=False))
    code, told, _ = run(*command[7:], "--json", hardware=str(tight), gpus=int(flags["--gpus"]))
    assert code == 0, "it fits"
    assert json.loads(told)["step_seconds"] == remedies[0]["step_seconds"]
    assert "remedies" not in json.loads(told)


def test_nothing_fits_into_nothing(run: Run, crowded: str) -> None:
    code, out, _ = run(hardware=crowded)
    assert code == 1
    assert "No change that was tried makes it fit" in out
    assert json.loads(run("--json", hardware=crowded)[1])["remedies"] == []

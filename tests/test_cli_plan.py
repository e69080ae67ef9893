"""`tp-plan plan` and what takes its file: text, JSON, progress, interrupts, errors, exit codes."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import pytest

import planner
from planner.report.streams import progress_text
from planner.spec.plan import Plan
from planner.spec.yaml_text import dump_yaml
from tests.command_line import tp_plan
from tests.tiny import tiny_spec

Run = Callable[..., tuple[int, str, str]]
SHORT = ("--seq-len", "256", "--global-batch", "32")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A spec file of a small model, in the folder where everything runs."""
    monkeypatch.chdir(tmp_path)
    return write_model()


def write_model() -> str:
    """The same in the folder where this runs."""
    Path("small.yaml").write_text(dump_yaml(tiny_spec("llama", layers=4, max_positions=512).to_dict()))
    return "small.yaml"


@pytest.fixture
def run() -> Run:
    """tp-plan with these words: its exit code, output and errors."""
    return lambda *words: astuple(tp_plan(*words))


@pytest.fixture
def planned(model: str, run: Run) -> Run:
    """`tp-plan plan` of the small model on so many H100."""

    def call(*flags: str) -> tuple[int, str, str]:
        return run("plan", model, "--hardware", "dgx-h100", "--gpus", "4", *SHORT, *flags)

    return call


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """tp-plan in a process of its own."""
    command = [sys.executable, "-m", "planner", *words]
    everything = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=everything)


def test_the_best_plan_on_stdout_and_in_a_file(planned: Run, model: str) -> None:
    code, out, err = planned("-o", "plan.yaml")
    assert code == 0
    assert out.startswith("Best: ")
    assert "proven optimal over " in out
    assert "Next: tp-plan explain plan.yaml" in out
    assert "wrote plan.yaml" in err
    assert "\x1b" not in out + err
    assert max(map(len, out.splitlines())) <= 120
    work = {"seq_len": 256, "global_batch": 32}
    assert Path("plan.yaml").read_text() == planner.plan(model, "dgx-h100", 4, work).to_yaml()


def test_quiet_says_nothing_else(planned: Run) -> None:
    assert planned("-q", "--fix", "dp=4")[::2] == (0, "")


def test_json_is_the_plan_and_the_seconds(planned: Run) -> None:
    code, out, _ = planned("--json", "-o", "plan.yaml", "--fix", "tp=2", "--fix", "pp=2")
    told = json.loads(out)
    seconds = told.pop("seconds")
    assert code == 0
    assert seconds > 0.0
    assert Plan.from_dict(told) == planner.load_plan("plan.yaml")
    assert told["certificate"]["gap"] == 0.0
    assert (told["strategy"]["tp"], told["strategy"]["pp"]) == (2, 2)
    assert "seconds: " not in Path("plan.yaml").read_text().split("\ncertificate:")[1].split("\nrunners_up")[0]


def test_every_wish_reaches_the_search(planned: Run) -> None:
    flags = ("--fix", "tp=1,pp=2", "--max-memory", "60GiB", "--memory-margin", "0.1", "--no-recompute",
             "--schedule", "gpipe", "--schedule", "1f1b", "--minimize", "cost",
             "--price", "2.5", "--solver", "cbc")  # fmt: skip
    code, out, _ = planned("-o", "plan.yaml", *flags)
    plan = planner.load_plan("plan.yaml")
    assert code == 0
    assert out.startswith("Cheapest: pp2")
    assert plan.certificate is not None
    assert (plan.certificate.solver, plan.certificate.minimize) == ("cbc", "cost_per_token")
    assert plan.strategy.schedule in ("gpipe", "1f1b")
    assert plan.strategy.recompute == "none"
    given = shlex.split(plan.command)
    assert all(flag in given for flag in flags if flag.startswith("--"))


def test_the_same_bytes_in_every_process_and_by_the_plans_own_command(model: str) -> None:
    words = ("plan", model, "--hardware", "dgx-h100", "--gpus", "2..4", *SHORT, "--fix", "zero=1", "-q")
    for name, seed in (("a", "1"), ("b", "2")):
        assert process(*words, "-o", f"{name}.yaml", PYTHONHASHSEED=seed).returncode == 0
    first = Path("a.yaml").read_text()
    assert Path("b.yaml").read_text() == first
    command = shlex.split(planner.load_plan("a.yaml").command)
    assert command[:2] == ["tp-plan", "plan"]
    assert process(*command[1:], "-q", "-o", "c.yaml", PYTHONHASHSEED="3").returncode == 0
    assert Path("c.yaml").read_text() == first


def test_a_batch_that_was_left_out_is_told(model: str, run: Run) -> None:
    code, _, err = run("plan", model, "--hardware", "dgx-h100", "--gpus", "3", "--fix", "dp=3")
    assert code == 0
    assert "global batch 192" in err


def test_a_time_limit_gives_the_best_so_far(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.search.optimize._BATCH", 8)
    code, out, err = run("plan", "gpt2", "--hardware", "dgx-h100", "--gpus", "16", "--time-limit", "0.001")
    assert code == 0
    assert out.startswith("Best found: ")
    assert " % from the best over " in out
    assert "ended early: the best so far" in err


def test_an_interrupt_gives_the_best_so_far(model: str) -> None:
    """Ctrl-C on a terminal, while the bar says that there is a plan already."""
    process("trace", "llama3.1-8b", "-q", "-o", "graph.yaml")
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "planner",
        "plan",
        "llama3.1-8b",
        "--hardware",
        "dgx-h100",
        "--gpus",
        "256..1024",
    ]
    seen = b""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    ) as child:
        os.close(theirs)
        watch = threading.Timer(120.0, child.kill)
        watch.start()
        while b"gap" not in seen:
            seen += os.read(ours, 65536)
        child.send_signal(signal.SIGINT)
        out = child.stdout.read().decode() if child.stdout else ""
        watch.cancel()
    with_rest = seen
    try:
        while part := os.read(ours, 65536):
            with_rest += part
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert child.returncode == 0
    assert out.startswith("Best found: ")
    assert b"searching" in seen
    assert b"ended early: the best so far" in with_rest
    assert b"Traceback" not in with_rest


def test_no_bar_where_nobody_looks(model: str) -> None:
    done = process("plan", model, "--hardware", "dgx-h100", "--gpus", "2", *SHORT)
    assert done.returncode == 0
    assert "searching" not in done.stderr
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == ["searched"]


def test_progress_in_words() -> None:
    seen = SimpleNamespace(explored=890, candidates=6609, best_seconds=14.2, bound_seconds=13.9)
    assert progress_text(seen) == "890 of 6,609, best 14.2 s, bound 13.9 s, gap 2.1 %"
    seen.best_seconds = float("inf")
    assert progress_text(seen) == "890 of 6,609, none that fits yet"


def test_nothing_fits_is_an_answer(planned: Run) -> None:
    code, out, err = planned("--max-memory", "1GiB", "-o", "plan.yaml", "--fix", "tp=1,pp=1,zero=0")
    assert (code, out) == (1, "")
    assert "error[memory]: no layout fits 1 GiB on 4 GPUs\n  closest: " in err
    assert "\n  fix: " in err
    assert not Path("plan.yaml").exists()
    code, out, _ = planned("--max-memory", "1GiB", "--fix", "tp=1,pp=1,zero=0", "--json")
    told = json.loads(out)["error"]
    assert code == 1
    assert told["key"] == "memory"
    assert told["misfit"]["closest"]["missing_bytes"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fix", "tpp=2"], "did you mean tp?"),
        (["--fix", "tp"], "key=value"),
        (["--fix", "tp=2", "--fix", "tp=4"], "tp is fixed once"),
        (["--fix", "tp=3"], "have 4 GPUs as their product"),
        (["--fix", "recompute=full", "--no-recompute"], "allow full"),
        (["--gpus", "0"], "1 to 1,000,000 GPUs"),
        (["--gpus", "8..4"], "write 4..8"),
        (["--gpus", "many"], "such as 64 or 8..1024"),
        (["--minimize", "gpus"], "longest step that will do"),
        (["--minimize", "cost"], "what a GPU costs"),
        (["--deadline", "3"], "minimize to gpus"),
        (["--max-memory", "70"], "70GiB"),
        (["--time-limit", "nan"], "finite"),
        (["--solver", "cplex"], "cbc"),
        (["--schedule", "2f2b"], "1f1b"),
        (["-o", "/nowhere/plan.yaml"], "cannot be written"),
        (["-o", "."], "directory"),
        (["-o", "small.yaml"], "which is the model as well"),
        (["-o", "--json"], "is a flag"),
        (["--precision", "fp7"], "fp8"),
        (["--global-batch", "0"], "at least 1"),
        (["--hardware", "dgx-h10"], "dgx-h100"),
    ],
)
def test_bad_input_is_exit_2_before_any_search(
    planned: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    if "tp=3" not in flags:
        monkeypatch.setattr("planner.search.optimize.Search.run", lambda _: pytest.fail("searched"))
    code, out, err = planned("-o", "plan.yaml", *flags)
    assert (code, out if "--json" not in flags else "") == (2, "")
    assert said in (err + out)
    assert "Traceback" not in err
    assert sorted(path.name for path in Path().iterdir()) == ["small.yaml"]


def test_an_old_file_outlives_a_search_without_an_answer(planned: Run) -> None:
    Path("plan.yaml").write_text("mine\n")
    assert planned("-o", "plan.yaml", "--max-memory", "1GiB", "--fix", "tp=1,pp=1,zero=0")[0] == 1
    assert Path("plan.yaml").read_text() == "mine\n"


def test_estimating_a_plan(planned: Run, run: Run) -> None:
    assert planned("-q", "-o", "plan.yaml", "--fix", "pp=2")[0] == 0
    plan = planner.load_plan("plan.yaml")
    code, out, err = run("estimate", "plan.yaml", "--json", "--timeline", "events.json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(plan.estimate.to_dict()))
    assert err == "wrote events.json\n"
    assert len(json.loads(Path("events.json").read_text())["ranks"]) == 2
    assert run("estimate", "plan.yaml")[1].startswith("Fits: ")
    code, _, err = run("estimate", "plan.yaml", "--tp", "2")
    assert code == 2
    assert "edit its file" in err
    assert "Missing option '--hardware'" in run("estimate", "small.yaml", "--gpus", "2")[2]
    assert "Missing option '--gpus'" in run("estimate", "small.yaml", "--hardware", "dgx-h100")[2]


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan of the small model that is there to be spoiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plan"))
        words = ("plan", write_model(), "--hardware", "dgx-h100", "--gpus", "4", *SHORT, "-q", "-o", "plan.yaml")
        assert tp_plan(*words, "--fix", "dp=4,zero=1,microbatch=1").returncode == 0
        return Path("plan.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: small.yaml", "model: gpt2", "was made for this model"),
        ("hardware: dgx-h100", "hardware: dgx-h200", "was made for this hardware"),
        ("hardware: dgx-h100", "hardware: nothing", "tp-plan list hardware"),
        ("version: 1", "version: 2", "version 1 are read"),
        ("strategy: {", "strategy: {tpp: 2, ", "did you mean"),
        ("stages:", "stages: [", "sound YAML"),
    ],
)
@pytest.mark.parametrize("verb", ["explain", "compare", "estimate"])
def test_a_plan_that_cannot_be_is_refused_with_its_line(
    model: str, run: Run, plan_text: str, verb: str, old: str, new: str, said: str
) -> None:
    assert plan_text.count(f"\n{old}") + plan_text.startswith(old) == 1
    Path("plan.yaml").write_text(f"\n{plan_text}".replace(f"\n{old}", f"\n{new}", 1)[1:])
    code, out, err = run(verb, "plan.yaml")
    assert (code, out) == (2, "")
    assert said in err
    assert "(plan.yaml:" in err


@pytest.mark.slow
def test_from_a_plan_to_a_page(model: str) -> None:
    """Llama 3.1 8B on a node, as a person would go about it."""
    done = process("plan", "llama3.1-8b", "--hardware", "dgx-h100", "--gpus", "8", "-o", "plan.yaml")
    assert done.returncode == 0, done.stderr
    assert "proven optimal" in done.stdout
    plan = planner.load_plan("plan.yaml")
    assert plan.estimate.fits
    assert plan.strategy.tp == 1  # nothing on a node of eight makes up for what tensor parallelism costs
    done = process(
        "plan", "llama3.1-8b", "--hardware", "dgx-h100", "--gpus", "8", "--fix", "tp=8", "-o", "tp8.yaml"
    )
    assert done.returncode == 0, done.stderr
    assert planner.load_plan("tp8.yaml").estimate.step_seconds >= plan.estimate.step_seconds
    done = process("compare", "plan.yaml", "tp8.yaml", "-o", "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan.yaml is ")
    assert Path("page.html").stat().st_size > 10_000
    done = process("estimate", "plan.yaml")
    assert done.returncode == 0, done.stderr

"""The command line as a user meets it: output, JSON, errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from tests.command_line import tp_plan as run


def test_list_models() -> None:
    done = run("list", "models")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) >= 50 + 2
    told = {model["name"]: model for model in json.loads(run("list", "models", "--json").stdout)}
    assert told["llama3.1-405b"]["parameters"] == 405_853_388_800
    assert set(told) == {spec.name for spec in planner.list_models()}


def test_explain_as_table_and_as_json() -> None:
    done = run("explain", "gpt2", "--seq-len", "1024")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpt2: 124 M parameters (124,439,808)")
    assert "blocks.0 × 12" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "\x1b" not in done.stdout
    told = json.loads(run("explain", "gpt2", "--seq-len", "1024", "--json").stdout)
    assert told["parameters"] == 124_439_808
    assert told["forward_flops"] == planner.trace("gpt2").flops(1, 1024)
    assert sum(block["repeats"] * block["forward_flops"] for block in told["blocks"]) == told["forward_flops"]
    assert "attention.core/sdpa" in run("explain", "gpt2").stdout
    assert "dropout" in run("explain", "gpt2", "--all").stdout


def test_explain_decoding() -> None:
    told = json.loads(run("explain", "gpt2", "--microbatch", "8", "--kv-len", "512", "--json").stdout)
    assert (told["seq_len"], told["kv_len"], told["backward_flops"], told["kept_bytes"]) == (1, 512, 0, 0.0)
    assert told["forward_flops"] == planner.trace("gpt2").flops(8, 1, 512)


def test_trace_writes_a_graph_that_reads_back(tmp_path: Path) -> None:
    from planner.spec.files import read_yaml

    done = run("trace", "gpt2", "-o", str(tmp_path / "graph.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"wrote {tmp_path}/graph.yaml\n"
    assert run("trace", "gpt2", "-q", "-o", str(tmp_path / "graph.yaml")).stderr == ""
    data, source = read_yaml(tmp_path / "graph.yaml")
    assert planner.Graph.from_dict(data, source) == planner.trace("gpt2")
    assert json.loads(run("trace", "gpt2", "--json").stdout) == planner.trace("gpt2").to_dict()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "llama3.1-70"], "did you mean llama3.1-70b?"),
        (["explain", "nothing-like-it"], "tp-plan list models"),
        (["explain", "no/such/file.yaml"], "does not exist"),
        (["explain", "model.py"], "write model.py:FUNCTION"),
        (["explain", "missing.py:make"], "does not exist"),
        (["explain", "gpt2", "--microbatch", "0"], "microbatch is at least 1"),
        (["explain", "gpt2", "--seq-len", "-4"], "seq_len is at least 1"),
        (["explain", "gpt2", "--seq-len", "9", "--kv-len", "3"], "at least the 9 new tokens"),
        (["explain", "megatron-22b", "--kv-len", "64"], "fused attention"),
        (["explain", "gpt2", "--dtype", "fp7"], "bf16, fp16, fp32"),
        (["trace", "gpt2", "-o", "/nowhere/graph.yaml"], "cannot be written"),
        (["explain", "gpt2", "--seq-len", "many"], "see `tp-plan explain --help`"),
        (["explian", "gpt2"], "No such command"),
        (["trace", "gpt2", "--lengths", "1,x,3"], "three whole numbers"),
        (["explain", "x" * 5000], "bundled name"),
        (["explain", "a\x01b"], "bundled name"),
        (["explain", "gpt2", "--seq-len", "1025"], "at most 1024"),
        (["explain", "gpt2", "--kv-len", "1025"], "at most 1024"),
        (["explain", "bert-large", "--kv-len", "64"], "decoding against a cache is for decoders"),
        (["explain", "t5-11b", "--kv-len", "64"], "decoding against a cache is for decoders"),
        (["explain", "vit-l-16", "--kv-len", "64"], "decoding against a cache is for decoders"),
        (["explain", "vit-l-16", "--seq-len", "64"], "the image sets the sequence length"),
        (["explain", "gpt2", "--lengths", "64,128,192"], "lengths belong to file.py:callable"),
        (["trace", "gpt2", "-o", "-q"], "is a flag, not a file"),
        (["explain", "/dev/zero"], "regular file"),
    ],
)
def test_bad_input_is_exit_2_with_a_remedy_and_no_traceback(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    told = json.loads(run(*arguments, "--json").stdout)
    assert set(told["error"]) >= {"key", "rule", "value", "remedy"}


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"layers: [", b"- 1", b"{}", b"layers: .nan", b"a: *b"])
def test_a_bad_spec_file_is_exit_2(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.yaml"
    file.write_bytes(content)
    done = run("explain", str(file))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_bug_of_ours_is_exit_101(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from planner import api, cli

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(api, "list_models", fail)
    monkeypatch.setattr(sys, "argv", ["tp-plan", "list", "models"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 101
    assert "ZeroDivisionError: oh" in capsys.readouterr().err


def test_a_bug_shown_with_its_traceback_is_exit_101_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planner import api, cli

    monkeypatch.setattr(api, "list_models", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["tp-plan", "list", "models", "-v"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 101
    assert "Traceback" in capsys.readouterr().err


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, where `tp-plan` is the one under test and the exit code that of any part that failed."""
    text = f'set -o pipefail; tp-plan() {{ {sys.executable} -m planner "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        errors="replace",
    )


@pytest.mark.parametrize(
    "line", ["list models", "list models --json", "list hardware", "--help", "explain gpt2 --all", "trace gpt2"]
)
def test_a_closed_pipe_is_quiet(line: str) -> None:
    for reader in ("true", "head -c 1 >/dev/null"):
        done = shell(f"tp-plan {line} | {reader}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "sink"),
    [
        *(("list models", sink) for sink in (">/dev/full", ">&-", "1</dev/null")),
        *((line, ">/dev/full") for line in ("list models --json", "--help", "trace gpt2", "nothing --json")),
        *((line, ">&-") for line in ("--help", "nothing --json")),
    ],
)
def test_an_output_that_cannot_be_written_is_exit_2(line: str, sink: str) -> None:
    done = shell(f"tp-plan {line} {sink}")
    assert done.returncode == 2
    assert done.stderr.startswith("error[stdout]: standard output cannot be written")
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize("sink", ["2>/dev/full", "2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_errors_that_nobody_reads_keep_their_exit_code(sink: str) -> None:
    assert shell(f"tp-plan explain nothing-like-it {sink}").returncode == 2


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.parametrize("line", ["list models", "explain gpt2", "explain dgx-h100", "explain \xd7"])
def test_any_encoding_can_be_written(line: str, environment: dict[str, str]) -> None:
    done = shell(f"tp-plan {line}", **environment)
    assert done.returncode == (2 if "\xd7" in line else 0), done.stderr
    assert "\u2500" not in done.stdout
    if "latin-1" not in environment.values():
        assert (done.stdout + done.stderr).isascii()
        assert line != "explain gpt2" or "1 x 1024 tokens" in done.stdout


@pytest.mark.parametrize("ends", ["sys.exit(0)", "sys.exit(3)", "sys.exit('no')", "raise SystemExit"])
@pytest.mark.parametrize("where", ["file", "callable", "forward"])
def test_code_of_a_model_does_not_decide_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, ends: str
) -> None:
    from planner import cli

    steps = {place: ends if place == where else "pass" for place in ("file", "callable", "forward")}
    (tmp_path / "own.py").write_text(
        f"import sys, torch\n{steps['file']}\n"
        f"class Own(torch.nn.Module):\n    def forward(self, x):\n        {steps['forward']}\n        return x\n"
        f"def make():\n    {steps['callable']}\n    return Own(), lambda b, s: dict(x=torch.zeros(b, s))\n"
    )
    monkeypatch.setattr(sys, "argv", ["tp-plan", "explain", f"{tmp_path}/own.py:make"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    done = run("explain", str(tmp_path / "pipe.yaml"))
    assert done.returncode == 2
    assert "regular file" in done.stderr


def test_a_flag_is_never_the_name_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("trace", "gpt2", "-o", "--json")
    assert done.returncode == 2
    assert "is a flag" in json.loads(done.stdout)["error"]["rule"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sizes", [{"microbatch": "2"}, {"seq_len": 1.5}, {"kv_len": True}, {"lengths": (64, 128)}]
)
def test_sizes_of_explain_are_whole_numbers(sizes: dict[str, object]) -> None:
    with pytest.raises(planner.PlannerError) as caught:
        planner.explain("gpt2", **sizes)  # type: ignore[arg-type]
    assert caught.value.key in sizes


def test_the_image_sets_the_length_of_a_vision_model() -> None:
    assert planner.explain("vit-l-16").seq_len == planner.explain("vit-l-16", seq_len=197).seq_len == 197


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert "_TP_PLAN_COMPLETE" in done.stdout


def test_completion_of_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TP_PLAN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "tp-plan explain llama3.1")
    monkeypatch.setenv("COMP_CWORD", "2")
    done = run()
    assert "plain,llama3.1-405b" in done.stdout.split()


def test_help_loads_nothing_heavy() -> None:
    """A tenth of a second of processor time, as long as it stays so."""
    words = [sys.executable, "-X", "importtime", "-m", "planner", "plan", "--help"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "networkx", "pulp", "highspy", "matplotlib"}


def test_planning_does_not_load_torch_where_the_graph_is_cached() -> None:
    planner.trace("gpt2")
    words = ["plan", "gpt2", "--hardware", "dgx-h100", "--gpus", "1", "-q"]
    code = (
        f"import sys; sys.argv = ['tp-plan', *{words!r}]\nfrom planner.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'numpy' in sys.modules; assert 'torch' not in sys.modules; assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["list", "models"], ["explain", "gpt2"], ["trace", "gpt2"]])
def test_torch_is_not_loaded_where_it_is_not_needed(arguments: list[str]) -> None:
    planner.trace("gpt2")
    code = (
        f"import sys; sys.argv = ['tp-plan', *{arguments!r}]\nfrom planner.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_and_flag_has_help() -> None:
    from planner.cli import cli

    for name, command in [*cli.commands.items(), *cli.commands["list"].commands.items()]:  # type: ignore[attr-defined]
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "fp7"], "fp7"),
        (["--device", "tpu"], "tpu"),
        (["--against", "no-such-profile"], "list hardware"),
        (["--nproc", "-3"], "nproc"),
        (["-o", "/nowhere/profile.yaml"], "/nowhere"),
    ],
)
def test_profile_refuses_before_it_measures(arguments: list[str], said: str) -> None:
    done = run("profile", "--quick", *arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_list_and_explain_hardware(tmp_path: Path) -> None:
    told = {profile["name"] for profile in json.loads(run("list", "hardware", "--json").stdout)}
    assert told == {profile.name for profile in planner.list_hardware()}
    assert "dgx-h100" in run("list", "hardware").stdout
    picture = tmp_path / "topology.png"
    done = run("explain", "dgx-h100", "-o", str(picture))
    assert done.returncode == 0, done.stderr
    assert "NVLink 4, NVLS" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(run("explain", "dgx-h100", "--json").stdout)["numbers"]
    assert {number["source"] for number in numbers} == {"measured", "datasheet", "assumed", "paper"}
    assert run("explain", "gpt2", "-o", str(tmp_path / "x.png")).returncode == 2


def test_a_traced_graph_is_a_model_too(tmp_path: Path) -> None:
    file = tmp_path / "graph.yaml"
    assert run("trace", "gpt2", "-q", "-o", str(file)).returncode == 0
    told = json.loads(run("explain", str(file), "--seq-len", "64", "--json").stdout)
    assert told["forward_flops"] == planner.trace("gpt2").flops(1, 64)
    assert planner.trace(file) == planner.trace("gpt2")
    file.write_text(file.read_text().replace("kind: attention", "kind: atention"))
    refused = run("explain", str(file))
    assert refused.returncode == 2
    assert "did you mean attention?" in refused.stderr
    assert f"{file}:" in refused.stderr

"""The command line: parse, one call of the API, render.

Exit codes: 0 done, 1 ran and the answer is no, 2 bad input, 101 our bug.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback

import click

from planner import __version__
from planner.cli.checks import verify
from planner.cli.estimates import estimate
from planner.cli.machine import profile, validate
from planner.cli.models import explain, list_, trace
from planner.cli.plans import compare, plan, sweep
from planner.cli.running import run
from planner.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_OUR_BUG, PlannerError
from planner.report.options import common, print_json
from planner.report.streams import Output, OutputError, prepare_streams, silence, tell

_INTERRUPTED = 130
_COMPLETION = "_TP_PLAN_COMPLETE"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tp-plan")
def cli() -> None:
    """Plan how to parallelise a model on a cluster: which degrees, which splits, will it fit, how fast."""


for _verb in (list_, explain, trace, estimate, plan, compare, sweep, verify, run, profile, validate):
    cli.add_command(_verb)


def main() -> None:
    """Entry point: turns every outcome into an exit code, and every error into one message."""
    arguments = sys.argv[1:]
    prepare_streams()
    code = EXIT_DONE
    try:
        with contextlib.redirect_stdout(Output(sys.stdout)):
            code = _outcome(arguments)
            sys.stdout.flush()
    except OutputError as failed:
        silence(sys.__stdout__)
        if not isinstance(failed.reason, BrokenPipeError):  # there the reader has seen enough, such as `| head`
            code = EXIT_BAD_INPUT
            tell(str(failed.told()))
    sys.exit(code)


def _outcome(arguments: list[str]) -> int:
    """Run the command line; every error is reported and becomes an exit code."""
    try:
        return _run(arguments)
    except PlannerError as error:
        return _fail(error, arguments, error.exit_code)
    except click.ClickException as error:
        return _fail(_usage(error), arguments, EXIT_BAD_INPUT)
    except (KeyboardInterrupt, click.exceptions.Abort):
        tell("interrupted")
        return _INTERRUPTED
    except SystemExit as ended:  # we call click such that it never exits: this comes from the code of a model
        rule, value = "the code of a model returns and does not end the program", f"exit({ended.code!r})"
        refusal = PlannerError(rule, value=value, remedy="take the call of exit out", key="model")
        return _fail(refusal, arguments, EXIT_BAD_INPUT)
    except OutputError:
        raise
    except Exception as error:
        if "-v" in arguments or "--verbose" in arguments:
            tell(traceback.format_exc())
        value, remedy = f"{type(error).__name__}: {error}", "run again with -v and report what it prints"
        bug = PlannerError("this is a bug of tp-plan", value=value, remedy=remedy, key="bug")
        return _fail(bug, arguments, EXIT_OUR_BUG)


def _run(arguments: list[str]) -> int:
    """What `cli.main` does, without its exits."""
    if instruction := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "tp-plan", _COMPLETION, instruction)
    try:
        with cli.make_context("tp-plan", arguments) as context:
            answer = cli.invoke(context)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    return answer if isinstance(answer, int) else EXIT_DONE


def _fail(error: PlannerError, arguments: list[str], code: int) -> int:
    if "--json" in arguments:
        print(json.dumps({"error": error.to_dict()}))
    else:
        _tell(error)
    return code


def _tell(error: PlannerError) -> None:
    """An error on stderr; that nothing fits is longer than a line, and wrapped."""
    misfit = getattr(error, "misfit", None)
    if misfit is None or sys.stderr is None:
        tell(str(error))
        return
    from planner.report.refusal import show_refusal

    try:
        show_refusal(misfit, sys.stderr)
    except OSError:  # closed or full: nobody is there to read it
        silence(sys.stderr)


def _usage(error: click.ClickException) -> PlannerError:
    context = getattr(error, "ctx", None)
    remedy = f"see `{context.command_path} --help`" if context else "see `tp-plan --help`"
    return PlannerError(error.format_message().rstrip("."), remedy=remedy, key="usage")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of a SHELL, such as: source <(tp-plan completion bash)."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    script = found(cli, {}, "tp-plan", _COMPLETION).source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        print(script)

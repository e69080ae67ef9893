"""`torchrun … -m planner.execute plan.yaml`: one rank of a training run."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from planner.errors import EXIT_DONE, PlannerError
from planner.spec.training_run import parse_arguments

try:
    asked = parse_arguments(sys.argv[1:])
except PlannerError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)

from planner.execute.process import leave
from planner.execute.train import run_rank

with redirect_stdout(sys.stderr):  # what a user's module prints is no result of ours
    code = run_rank(asked)
leave(code or EXIT_DONE)

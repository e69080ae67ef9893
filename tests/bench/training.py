"""The training constants of the profiles against published runs: python tests/bench/training.py [DATA_FOLDER]

Without a flag how well the shipped profiles predict the runs, by source, and how close anything could come to two
of the tables. --fit refits the constants; --left-out also fits them without each source and predicts that source
with them (about ten minutes); -o FILE writes those errors as `tp-plan validate --left-out FILE` takes them.
Nothing is asserted and no profile is written. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

from planner.report.accuracy import FEWEST_TO_AVERAGE, Validation, judge  # noqa: E402
from planner.report.accuracy_pages import COLUMNS, evidence, time_row, verdict  # noqa: E402
from planner.spec.files import write_text  # noqa: E402
from tests.bench.training_constants import CONSTANTS, read_off  # noqa: E402
from tests.bench.training_fit import State, fitted, predicted_seconds, without  # noqa: E402
from tests.bench.training_floor import head_ratios, multi_node, single_node  # noqa: E402
from tests.bench.training_rows import (  # noqa: E402
    FILES,
    TARGETS,
    Floats,
    Row,
    Values,
    note,
    rows_of,
    sampled,
    shipped_predictions,
    timed_runs,
)
from tests.measured_rows import DATA, MissingDataError  # noqa: E402


def show_shipped(validation: Validation) -> None:
    """Errors of the shipped profiles by source."""
    print("The shipped profiles")
    print(f"{'':26}" + "".join(f"{column.lstrip('>'):>14}" for column in COLUMNS[1:]))
    for source in validation.sources:
        if source.time:
            name, *cells = time_row(source)
            print(f"{name:26}" + "".join(f"{cell:>14}" for cell in cells))
    for line in (verdict(validation), *evidence(validation)):
        print(line)


def show_floors(folder: Path) -> None:
    """How close anything plain comes to two tables."""
    floor = single_node(folder)
    print("\nHow close a plain model can come")
    print(f"single node  {floor.steps} steps, {floor.composed:.1%} off what they are composed from")
    print(f"             with smooth layer times {floor.smooth:.1%} off")
    print(f"             of layers {floor.layers:.1%}, at most {floor.farthest_layer:.1%}")
    ratios = head_ratios(folder)
    print(f"             embedding and head with tp 1 over tp 2: {min(ratios):.1f} to {max(ratios):.1f}")
    for tp, count, mean, most in multi_node(folder):
        print(f"multi-node   tp {tp}: {count} steps, six terms leave {mean:.1%}, at most {most:.1%}")


def show_constants(shipped: Values, state: State) -> None:
    """Shipped against fitted, beside what one believed before."""
    print(f"\n{'Constant':42}{'prior':>16}{'shipped':>10}{'fitted':>10}")
    for constant in CONSTANTS:
        belief = f"{constant.prior:g} ± {constant.spread:g}"
        values = f"{shipped[constant.name]:>10.4g}{state.named[constant.name]:>10.4g}"
        print(f"{constant.name:42}{belief:>16}{values}")


def logs(rows: Sequence[Row], values: Values) -> Floats:
    """Logarithms of measured over predicted."""
    return np.log(np.array([row.seconds for row in rows]) / predicted_seconds(rows, values))


def mape(found: Floats) -> float:
    """Mean absolute relative error of such logarithms."""
    return float(np.mean(np.abs(np.exp(-found) - 1.0)))


def by_source(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every source that is fitted to."""
    found = {source: [row for row in rows if row.run.source == source] for source in TARGETS}
    return {source: own for source, own in found.items() if own}


def show_fitted(sources: Mapping[str, Sequence[Row]], shipped: Values, state: State) -> None:
    """Errors by source before and after the fit."""
    given = {source: logs(rows, shipped) for source, rows in sources.items()}
    before = {source: mape(found) for source, found in given.items()}
    after = {source: mape(logs(rows, state.named)) for source, rows in sources.items()}
    lost = max(np.abs(np.exp(given[row.run.source][place]) * row.shipped_seconds / row.seconds - 1.0)
               for rows in sources.values() for place, row in enumerate(rows))  # fmt: skip
    print(f"\nThe constants as read off the profiles give back their predictions to {lost:.2%}")
    print(f"{'MAPE':26}{'rows':>6}{'shipped':>10}{'fitted':>10}")
    for source, rows in sources.items():
        print(f"{source:26}{len(rows):>6}{before[source]:>10.1%}{after[source]:>10.1%}")
    means = "".join(f"{float(np.mean(list(each.values()))):>10.2%}" for each in (before, after))
    print(f"{'mean over sources':32}{means}")


def left_out(
    sources: Mapping[str, Sequence[Row]], sample: Sequence[Row], state: State, validation: Validation
) -> dict[str, float]:
    """Every source predicted with constants fitted without it: its error, and the spreads by regime."""
    noise = {source.source: source.noise for source in validation.sources}
    apart: dict[str, Floats] = {}
    print(f"\n{'MAPE':26}{'rows':>6}{'fitted':>10}{'left out':>10}{'noise':>8}  constants half a spread away")
    found: dict[str, float] = {}
    full = {source: mape(logs(rows, state.named)) for source, rows in sources.items()}
    for source, rows in sources.items():
        other = without(sample, state, source)
        note(f"without {source}")
        apart[source] = logs(rows, other.named)
        found[source] = mape(apart[source])
        moved = ", ".join(
            f"{constant.name} {other.named[constant.name]:.3g}"
            for constant in CONSTANTS
            if abs(other.named[constant.name] - state.named[constant.name]) > 0.5 * constant.spread
        )
        repeats = noise[source]
        shown = f"{repeats.mean:.1%}" if repeats else "–"
        print(f"{source:26}{len(rows):>6}{full[source]:>10.1%}{found[source]:>10.1%}{shown:>8}  {moved or '–'}")
        sys.stdout.flush()
    means = "".join(f"{float(np.mean(list(each.values()))):>10.2%}" for each in (full, found))
    print(f"{'mean over sources':32}{means}")
    show_spreads(sources, apart)
    return found


def show_spreads(sources: Mapping[str, Sequence[Row]], apart: Mapping[str, Floats]) -> None:
    """Root mean square of the logarithms by regime: over its rows, and with sources of enough rows alike."""
    print(
        f"\n{'log(measured/predicted), left out':34}{'rows':>6}{'by rows':>10}{'by source':>11}{'80 % within':>13}"
    )
    for regime in sorted({row.regime for rows in sources.values() for row in rows}):
        own = {
            source: apart[source][[row.regime == regime for row in rows]]
            for source, rows in sources.items()
            if any(row.regime == regime for row in rows)
        }
        every = np.concatenate(list(own.values()))
        pooled = float(np.sqrt(np.mean(every**2)))
        many = [each for each in own.values() if len(each) >= FEWEST_TO_AVERAGE]
        equal = float(np.sqrt(np.mean([np.mean(each**2) for each in many]))) if many else float("nan")
        within = float(np.quantile(np.abs(every), 0.8))
        print(f"{regime:34}{len(every):>6}{pooled:>10.3f}{equal:>11.3f}{within:>13.3f}")
        for source, each in own.items():
            print(f"    {source:30}{len(each):>6}{float(np.sqrt(np.mean(each**2))):>10.3f}")


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description="the training constants against published runs")
    parser.add_argument("folder", nargs="?", type=Path, default=DATA, help="published measurements")
    parser.add_argument("--fit", action="store_true", help="refit the constants")
    parser.add_argument("--left-out", action="store_true", help="and without each source, which they then predict")
    parser.add_argument("-o", "--output", type=Path, help="write the errors of left-out sources as JSON")
    given = parser.parse_args()
    if given.output and not given.left_out:
        parser.error("-o holds the errors of left-out sources: it needs --left-out")
    try:
        runs = timed_runs(given.folder)
        predictions = shipped_predictions(runs)
        note(f"{len(runs)} runs estimated with the shipped profiles")
        validation = judge(FILES, predictions)
        show_shipped(validation)
        show_floors(given.folder)
    except MissingDataError as error:
        print(f"{error}\ngive their folder: python tests/bench/training.py DATA_FOLDER", file=sys.stderr)
        return 1
    if not (given.fit or given.left_out):
        return 0
    rows = rows_of(predictions)
    sample, shipped, sources = sampled(rows), read_off(rows), by_source(rows)
    note(f"fitting to {len(sample)} of {len(rows)} rows, one of each class")
    state = fitted(sample, shipped)
    show_constants(shipped, state)
    show_fitted(sources, shipped, state)
    if given.left_out:
        found = left_out(sources, sample, state, validation)
        if given.output:
            rounded = {source: round(error, 4) for source, error in found.items()}
            write_text(given.output, json.dumps(rounded, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

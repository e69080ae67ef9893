"""The shipped profiles against published measurements: python tests/bench/kernels.py [DATA_FOLDER]

Errors are relative to the measured time. `numbers` are those of the curve that stand in the profile as
measured. `noise` is what repeats of nearly equal work differ by. Nothing is asserted; the tests do that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import planner  # noqa: E402
from tests.measured_rows import (  # noqa: E402
    ACROSS_NODES,
    COLLECTIVES,
    DATA,
    ELEMENTS,
    ENGINE_MODES,
    GEMM_DTYPES,
    KV_DTYPES,
    MESH,
    MESH_SIZES,
    PHASES,
    SYSTEMS,
    Floats,
    MissingDataError,
    Rows,
    across_nodes_profile,
    across_nodes_rows,
    attention_rows,
    custom_all_reduce_rows,
    custom_predicted,
    gemm_rows,
    mesh_rows,
    nccl_rows,
    profile,
    releases_apart,
    twins_apart,
)

SPOKEN_OF = ("dgx-a100-80g", "dgx-h100", "dgx-h200", "dgx-b200")  # by the targets of attention
NEAR = 1.13  # rows of one weight whose m differ by less are neighbours


def numbers(name: str, prefix: str) -> int:
    """Numbers of a section that the profile calls measured."""
    found = profile(name).numbers()
    return sum(number.source == "measured" and number.key.startswith(prefix) for number in found)


def mape(ratio: Floats) -> float:
    """Mean absolute percentage error."""
    return float(100 * np.mean(np.abs(ratio - 1))) if ratio.size else float("nan")


def bias(ratio: Floats) -> float:
    """Median of predicted over measured, less one, in percent."""
    return float(100 * (np.median(ratio) - 1)) if ratio.size else float("nan")


def ranking(predicted: Floats, measured: Floats) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(predicted, measured).statistic)


class Table:
    """Rows under a title, and footnotes about rows left out."""

    def __init__(self, title: str, heads: Sequence[str]) -> None:
        self.title, self.heads = title, heads
        self.lines: list[list[str]] = []
        self.notes: list[str] = []

    def add(self, *cells: Any) -> None:
        """A line; numbers with two decimals, nothing where there is none."""
        self.lines.append([_cell(cell) for cell in cells])

    def left_out(self, rows: Rows) -> str:
        """Count of rows left out, marked with the letters of the reasons."""
        marks = ""
        for reason in rows.left_out:
            if reason not in self.notes:
                self.notes.append(reason)
            marks += "abcdefgh"[self.notes.index(reason)]
        return f"{np.sum(~rows.kept)} {marks:<2}" if marks else "0   "

    def show(self) -> None:
        """Print it."""
        widths = [max(map(len, column)) for column in zip(self.heads, *self.lines, strict=True)]
        print(f"\n{self.title}")
        for line in (list(self.heads), *self.lines):
            pairs = zip(line, widths, strict=True)
            print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs)))
        for letter, note in zip("abcdefgh", self.notes, strict=False):
            print(f"  {letter}  {note}")


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return "–" if np.isnan(cell) else f"{cell:.2f}"
    return str(cell)


def gemm(folder: Path) -> dict[tuple[str, str], float]:
    """Matrix products; the error over all shapes by dtype and profile."""
    heads = ("system", "dtype", "rows", "left out", "n,k≥1024", "all", "bias", "rank", "numbers", "noise")
    found, errors = Table("Matrix products, error in %", heads), {}
    for dtype in GEMM_DTYPES:
        for name in SYSTEMS:
            rows = gemm_rows(name, dtype, folder)
            if dtype not in profile(name).gemm or not rows.kept.any():
                continue
            sizes, measured = rows.where(rows.kept), rows.seconds[rows.kept]
            predicted = planner.gemm_seconds(profile(name), **sizes, dtype=dtype)
            ratio = predicted / measured
            large = (sizes["n"] >= 1024) & (sizes["k"] >= 1024)
            errors[dtype, name] = mape(ratio)
            found.add(
                name, dtype, len(rows.seconds), found.left_out(rows), mape(ratio[large]), mape(ratio), bias(ratio),
                f"{ranking(predicted, measured):.4f}", numbers(name, f"gemm.{dtype}."), _gemm_noise(sizes, ratio),
            )  # fmt: skip
    found.show()
    print("  noise: neighbours along m of one weight, by how their errors differ, over √2")
    print("  numbers 0: the profile calls the curve assumed; rows filed under B300 are labelled GB300")
    return errors


def _gemm_noise(sizes: dict[str, Floats], ratio: Floats) -> float:
    order = np.lexsort((sizes["m"], sizes["k"], sizes["n"]))
    m, n, k, log = (value[order] for value in (sizes["m"], sizes["n"], sizes["k"], np.log(ratio)))
    near = (np.diff(n) == 0) & (np.diff(k) == 0) & (m[1:] / m[:-1] < NEAR)
    return float(100 * np.mean(np.abs(np.diff(log))[near]) / np.sqrt(2)) if near.any() else float("nan")


def attention(folder: Path) -> dict[tuple[str, str, str], float]:
    """Fused attention; the error over all rows, those left out of the fit too, by phase, dtype and profile."""
    heads = ("system", "phase", "kv", "rows", "left out", "error", "every row", "bias", "rank", "numbers", "noise")
    found, errors = Table("Attention, error in %", heads), {}
    for phase in PHASES:
        for dtype in KV_DTYPES:
            for name in SYSTEMS:
                rows = attention_rows(name, phase, dtype, folder)
                if dtype not in profile(name).attention or not len(rows.seconds):
                    continue
                predicted = planner.attention_seconds(profile(name), phase=phase, dtype=dtype, **rows.sizes)
                ratio = predicted / rows.seconds
                errors[phase, dtype, name] = mape(ratio)
                kernels = [phase, "wide_decode"] if phase == "decode" else [phase]
                many = [numbers(name, f"attention.{dtype}.{kernel}.") for kernel in kernels]
                usual = ratio[rows.kept]
                found.add(
                    name, phase, dtype, len(ratio), found.left_out(rows), mape(usual), errors[phase, dtype, name],
                    bias(usual), f"{ranking(predicted[rows.kept], rows.seconds[rows.kept]):.4f}",
                    "+".join(str(count) for count in many if count), _attention_noise(rows),
                )  # fmt: skip
    found.show()
    print("  noise: rows of equal batch · heads, lengths and head dim, beside their median")
    return errors


def _attention_noise(rows: Rows) -> float:
    sizes = rows.where(rows.kept)
    keys = (
        sizes["batch"] * sizes["heads"], sizes["batch"] * sizes["kv_heads"], sizes["query_len"], sizes["kv_len"],
        sizes["head_dim"], rows.kernel[rows.kept],
    )  # fmt: skip
    alike: dict[tuple[Any, ...], list[float]] = {}
    for key, seconds in zip(zip(*keys, strict=True), rows.seconds[rows.kept].tolist(), strict=True):
        alike.setdefault(key, []).append(seconds)
    apart = [abs(one / np.median(many) - 1) for many in alike.values() if len(many) > 1 for one in many]
    return float(100 * np.mean(apart)) if apart else float("nan")


def collectives(folder: Path) -> dict[tuple[str, str], float]:
    """NCCL inside a node; the error by collective and profile."""
    heads = ("system", "collective", "rows", "left out", "error", "bias", "rank", "numbers/size", "noise")
    found, errors = Table("Collectives inside a node, error in %", heads), {}
    for kind in COLLECTIVES:
        for name in SYSTEMS:
            rows = nccl_rows(name, kind, folder)
            if not rows.kept.any():
                continue
            predicted = _nccl_predicted(name, kind, rows)[rows.kept]
            ratio = predicted / rows.seconds[rows.kept]
            errors[kind, name] = mape(ratio)
            tables = [level.collectives.get(kind) for level in profile(name).topology.values()]
            noise = 100 * twins_apart(rows) if kind in ("all_gather", "all_to_all") else float("nan")
            many = next((table.numbers_per_size for table in tables if table), 0.0)
            found.add(
                name, kind, len(rows.seconds), found.left_out(rows), mape(ratio), bias(ratio),
                f"{ranking(predicted, rows.seconds[rows.kept]):.4f}", many, noise,
            )  # fmt: skip
    found.show()
    print("  noise: equal bytes of half and int8, where elements are not added up")
    return errors


def _nccl_predicted(name: str, kind: str, rows: Rows) -> Floats:
    predicted = np.full(len(rows.seconds), np.nan)
    for size in np.unique(rows.sizes["ranks"][rows.kept]):
        for one_byte, dtype in enumerate(ELEMENTS.values()):
            here = rows.kept & (rows.sizes["ranks"] == size) & (rows.sizes["int8"] == one_byte)
            predicted[here] = planner.collective_seconds(
                profile(name), kind, rows.sizes["bytes"][here], ranks=range(int(size)), dtype=dtype
            )
    return predicted


def custom_all_reduces(folder: Path) -> dict[tuple[str, str], float]:
    """The serving engines' own all-reduce; the error by how it is launched and profile."""
    heads = ("system", "launched", "rows", "left out", "error", "bias", "rank", "numbers/size", "NCCL's", "noise")
    found, errors = Table("A serving engine's all-reduce, error in %", heads), {}
    for mode in ENGINE_MODES:
        for name in SYSTEMS:
            tables = [level.custom_all_reduce.get(mode) for level in profile(name).topology.values()]
            rows, _ = custom_all_reduce_rows(name, mode, folder)
            many = next((table.numbers_per_size for table in tables if table), 0.0)
            if not rows.kept.any() or not many:
                continue
            own, library = (custom_predicted(name, rows, custom) for custom in (mode, None))
            measured = rows.seconds[rows.kept]
            errors[mode, name] = mape(own / measured)
            found.add(
                name, mode, len(rows.seconds), found.left_out(rows), errors[mode, name], bias(own / measured),
                f"{ranking(own, measured):.4f}", many, mape(library / measured),
                100 * releases_apart(name, mode, folder),
            )  # fmt: skip
    found.show()
    print("  NCCL's: error of the library's cost; noise: the release before, on the same rows")
    return errors


def mesh(folder: Path) -> dict[str, float]:
    """All-reduces in a hybrid cube mesh; the error by profile and group size."""
    found, errors = Table("All-reduce in a hybrid cube mesh, error in %", ("profile", "GPUs", "rows", "error")), {}
    for size in MESH_SIZES:
        rows = mesh_rows((size,), folder)
        count = rows.sizes["bytes"]
        predicted = planner.collective_seconds(profile(MESH), "all_reduce", count, ranks=range(size), dtype="fp32")
        errors[f"{MESH} {size}"] = mape(predicted / rows.seconds)
        found.add(MESH, size, len(count), errors[f"{MESH} {size}"])
    found.show()
    return errors


def across_nodes(folder: Path) -> Floats:
    """All-reduces across nodes; predicted over measured of every row."""
    found = Table("All-reduce across nodes, error in %", ("published system", "profile", "rows", "error", "bias"))
    every = []
    for system, (name, changes) in ACROSS_NODES.items():
        nodes, count, measured = across_nodes_rows(system, folder)
        ratio = np.empty(len(measured))
        for size in np.unique(nodes):
            here, ranks = nodes == size, range(8 * int(size))
            ratio[here] = planner.collective_seconds(
                across_nodes_profile(system), "all_reduce", count[here], ranks=ranks, dtype="fp32"
            )
        ratio /= measured
        every.append(ratio)
        found.add(system, name + (" *" if changes else ""), len(ratio), mape(ratio), bias(ratio))
    found.show()
    print("  *  with the network of the published system")
    return np.concatenate(every)


def main(arguments: Sequence[str]) -> int:
    """Print the tables, then a line per target."""
    folder = Path(arguments[0]).resolve() if arguments else DATA
    try:
        products, fused = gemm(folder), attention(folder)
        inside, outside = collectives(folder), across_nodes(folder)
        custom_all_reduces(folder), mesh(folder)
    except MissingDataError as error:
        print(f"{error}\ngive their folder: python tests/bench/kernels.py DATA_FOLDER", file=sys.stderr)
        return 1
    print("\nTargets, error in %")
    for label, error, limit in _targets(products, fused, inside, outside):
        print(f"{label:64} {error:6.2f}  target {limit:4.1f}  {'met' if error <= limit else 'MISSED'}")
    return 0


def _targets(
    products: dict[tuple[str, str], float],
    fused: dict[tuple[str, str, str], float],
    inside: dict[tuple[str, str], float],
    outside: Floats,
) -> Iterator[tuple[str, float, float]]:
    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    for dtype, limit in (("bf16", 12.0), ("fp8", 16.0)):
        of = [error for (precision, _), error in products.items() if precision == dtype]
        yield f"{dtype} products of all shapes, mean over {len(of)} systems", mean(of), limit
    for phase, limit in (("prefill", 12.0), ("decode", 9.0)):
        label = f"{phase} attention in bf16, every row, mean over A100, H100, H200, B200"
        yield label, mean(fused[phase, "bf16", name] for name in SPOKEN_OF), limit
    yield "collectives inside a node, mean over systems and collectives", mean(inside.values()), 6.0
    yield "collectives inside a node, the worst of them", max(inside.values()), 6.0
    yield f"all-reduce across nodes, mean over {outside.size} rows", mape(outside), 20.0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

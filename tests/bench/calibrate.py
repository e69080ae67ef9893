"""Refit the measured constants: python tests/bench/calibrate.py [DATA_FOLDER] [--only PART] [--write]

Without --write a check: what the fitters make of the published measurements must equal what the profiles
hold, to rounding. PART is gemm, attention or collectives. --write puts new numbers into hardware_profiles/;
sections that are assumed, such as those derived from measured ones, stay as they are.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

from planner.cost.attention import decode_seconds, prefill_seconds  # noqa: E402
from planner.cost.gemm import gemm_seconds  # noqa: E402
from planner.measure.fit_attention import DECODE_START, PREFILL_START, assess, fit_curve  # noqa: E402
from planner.measure.fit_collective import Timings, fit_collective  # noqa: E402
from planner.measure.fit_gemm import fit_gemm  # noqa: E402
from planner.spec.codec import encode  # noqa: E402
from planner.spec.files import bundled_folder, read_yaml, write_text  # noqa: E402
from planner.spec.hardware import AttentionCurve, DecodeCurve  # noqa: E402
from planner.spec.provenance import Section  # noqa: E402
from planner.spec.workload import KvPrecision, Precision  # noqa: E402
from planner.spec.yaml_text import dump_yaml  # noqa: E402
from planner.units import MIB  # noqa: E402
from tests.measured_rows import (  # noqa: E402
    DATA,
    GEMM_DTYPES,
    KV_DTYPES,
    MESH,
    SYSTEMS,
    MissingDataError,
    Rows,
    attention_rows,
    custom_all_reduce_rows,
    gemm_rows,
    mesh_rows,
    nccl_rows,
    profile,
    twins_apart,
)

ALIKE = {"dgx-a100-80g": ("dgx-a100-40g", "aws-p4d"), "dgx-h100": ("aws-p5",)}  # profiles of the same GPU
GEMM_DIGITS, DIGITS = 3, 4
ABOUT = ("source", "reference", "spread", "other_sources")
SOURCE: dict[str, Any] = {"source": "measured", "reference": "rows being fitted"}

Found = tuple[tuple[str, ...], dict[str, Any], dict[str, str]]  # keys of a section, its numbers, what is said


def gemm(name: str, folder: Path) -> Iterator[Found]:
    """Matrix products. The memory bandwidth of bf16 holds for all, and blocks share what is fp8's outside them."""
    full: dict[Precision, dict[str, float]] = {}
    device = profile(name).device
    for dtype in GEMM_DTYPES:
        curve, rows = profile(name).gemm.get(dtype), gemm_rows(name, dtype, folder)
        if curve is None or curve.source != "measured" or not rows.fitted.any():
            continue
        given: dict[str, float] = {}
        if dtype == "fp8_block":  # its small products show the host, so that rows of this kind say nothing of them
            shared = ("floor_us", "bandwidth_efficiency", "k_step_ns", "split_k", "cast_row_ns", "m_half")
            given = {"split_k": 0.0} | {key: full["fp8"][key] for key in shared if key in full["fp8"]}
        elif dtype != "bf16":
            given = {"bandwidth_efficiency": full["bf16"]["bandwidth_efficiency"]}
        m, n, k = rows.where(rows.fitted).values()
        full[dtype] = fit_gemm(
            gemm_seconds, device, dtype, m, n, k, rows.seconds[rows.fitted], cast=dtype != "bf16", given=given
        )
        numbers = {key: float(f"{value:.{GEMM_DIGITS}g}") for key, value in full[dtype].items() if value}
        said = {r"fitted to \d+ of \d+ rows": f"fitted to {rows.fitted.sum()} of {len(rows.seconds)} rows"}
        yield ("gemm", dtype), numbers, said


# Where prefill in fp8 runs into the power limit, and where the last-level cache is large enough for a
# benchmark's keys and values: elsewhere the rows do not tell these numbers from nothing
THROTTLED_IN_FP8 = ("l40s-pcie",)
CACHING = ("dgx-b200", "dgx-b300", "gb200-nvl72", "gb300-nvl72", "l40s-pcie", "rtx-pro-6000-pcie")
CACHE_START = {"cached_share": 0.4, "cached_mib": 80.0}
# FlashAttention 2 on L40S and RTX PRO 6000: 21 to 23. Stands where a single head dim was timed
HEAD_DIM_HALF = 22.0
WIDE_START = {
    "bandwidth_efficiency": 0.9, "floor_us": 11.0, "sequence_head_us": 0.2, "query_share": 0.04,
    "stream_power": 1.5, "split_us": 5.0, "scan_us": 1.2, "scan_pair_us": 0.004,
}  # fmt: skip
WIDE = 256
# Of the batches timed, 512 is the largest that scans all sequences and 1024 the smallest that does not
SCAN_SEQUENCES, SPLIT_TOKENS = 1024, 4096.0


def attention(name: str, folder: Path) -> Iterator[Found]:
    """Fused attention; decoding computes at the efficiency of prefill."""
    for dtype in KV_DTYPES:
        curves, rows = profile(name).attention.get(dtype), attention_rows(name, "prefill", dtype, folder)
        if curves is None or curves.prefill.source != "measured" or not rows.fitted.any():
            continue
        head_dims = np.unique(rows.sizes["head_dim"][rows.fitted])
        start, known = dict(PREFILL_START), {"head_dim_half": HEAD_DIM_HALF}
        if len(head_dims) == 1:
            del start["head_dim_half"]
        else:
            del known["head_dim_half"]
        if head_dims.max() > WIDE:
            start["wide_factor"] = 2.0
        if dtype == "fp8" and name not in THROTTLED_IN_FP8:
            del start["throttle_share"], start["throttle_ms"]
        fixed = AttentionCurve(**SOURCE, efficiency=0.6, bandwidth_efficiency=0.6, floor_us=10.0, **known)
        prefill = _fused(name, dtype, rows, rows.fitted, fixed, start)
        yield ("attention", dtype, "prefill"), *prefill
        yield from _decode(name, dtype, prefill[0]["efficiency"], folder)


def _decode(name: str, dtype: KvPrecision, efficiency: float, folder: Path) -> Iterator[Found]:
    rows = attention_rows(name, "decode", dtype, folder)
    start = dict(DECODE_START)
    if len(np.unique(rows.sizes["head_dim"][rows.fitted])) == 1:
        del start["head_dim_us"]
    if name in CACHING:
        start |= CACHE_START
    fixed = DecodeCurve(**SOURCE, efficiency=efficiency, bandwidth_efficiency=0.9, floor_us=10.0)
    wide = (rows.sizes["head_dim"] > WIDE) & (profile(name).attention_for(dtype).wide_decode is not None)
    yield ("attention", dtype, "decode"), *_fused(name, dtype, rows, rows.fitted & ~wide, fixed, start)
    if wide.any():
        fixed = DecodeCurve(
            **SOURCE, efficiency=efficiency, bandwidth_efficiency=0.9, floor_us=10.0,
            scan_sequences=SCAN_SEQUENCES, split_tokens=SPLIT_TOKENS,
        )  # fmt: skip
        found = _fused(name, dtype, rows, rows.fitted & wide, fixed, WIDE_START)
        yield ("attention", dtype, "wide_decode"), *found


def _fused(
    name: str, dtype: KvPrecision, rows: Rows, mask: Any, fixed: Any, start: dict[str, float]
) -> tuple[dict[str, Any], dict[str, str]]:
    sizes = rows.where(mask)
    sizes["value_dim"] = sizes["head_dim"]
    formula: Any = prefill_seconds if isinstance(fixed, AttentionCurve) else decode_seconds

    def predict(curve: Any) -> Any:
        return formula(profile(name).device, curve, dtype, **sizes)

    curve = fit_curve(fixed, start, predict, rows.seconds[mask])
    error = assess(predict(curve), rows.seconds[mask]).mean_absolute_error
    said = {
        r"^\d+ published": f"{mask.sum()} published",
        r"mean error [\d.]+ %": f"mean error {error:.1f} %",
    }
    return _numbers(curve), said


def collectives(name: str, folder: Path) -> Iterator[Found]:
    """NCCL and the all-reduce of a serving engine; reducing in switches is seen on eight Hopper GPUs alone."""
    for level, item in profile(name).topology.items():
        for kind, table in item.collectives.items():
            if table.source == "measured" and kind != "broadcast":
                rows = mesh_rows(table.ranks, folder) if name == MESH else nccl_rows(name, kind, folder)
                switches = kind == "all_reduce" and name in ("dgx-h100", "dgx-h200")
                spread = twins_apart(rows) if kind in ("all_gather", "all_to_all") else 0.0
                found = fit_collective(
                    kind, _timings(rows), reference="rows", spread=spread, switches_reduce=switches,
                    low_latency=name != MESH,
                )  # fmt: skip
                yield ("topology", level, "collectives", kind), _numbers(found), {}
        for mode, table in item.custom_all_reduce.items():
            if table.source == "measured":
                rows, largest = custom_all_reduce_rows(name, mode, folder)
                found = fit_collective("all_reduce", _timings(rows), reference="rows")
                numbers = _numbers(found) | {"largest_mib": largest / MIB}
                said = {r"to [\d.]+ MiB": f"to {largest / MIB:g} MiB"}
                yield ("topology", level, "custom_all_reduce", mode), numbers, said


def _timings(rows: Rows) -> Timings:
    sizes = rows.where(rows.fitted)
    return Timings(
        ranks=sizes["ranks"].astype(np.int64),
        bytes=sizes["bytes"],
        seconds=rows.seconds[rows.fitted],
        one_byte=sizes["int8"] > 0,
    )


def _numbers(section: Section) -> dict[str, Any]:
    return {key: value for key, value in encode(section, omit_defaults=True).items() if key not in ABOUT}


PARTS: dict[str, Callable[[str, Path], Iterator[Found]]] = {
    "gemm": gemm,
    "attention": attention,
    "collectives": collectives,
}


def same(old: Any, new: Any, digits: int) -> bool:
    """Equal but for one in the last digit."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(same(*pair, digits) for pair in zip(old, new, strict=True))
    if not (isinstance(old, (int, float)) and isinstance(new, (int, float))) or not old:
        return bool(old == new)
    return bool(abs(new - old) <= 1.01 * 10.0 ** (math.floor(math.log10(abs(old))) - digits + 1))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{number:g}" for number in value) + "]"
    return "–" if value is None else f"{value:g}"


def check(title: str, section: dict[str, Any], numbers: dict[str, Any], digits: int) -> int:
    """Print a section's numbers that differ, old and new; how many do."""
    old = {key: value for key, value in section.items() if key not in ABOUT}
    apart = [key for key in old | numbers if not same(old.get(key), numbers.get(key), digits)]
    equal = sum(old.get(key) == numbers.get(key) for key in old | numbers)
    rounded = len(old | numbers) - equal - len(apart)
    ending = f", {rounded} but for the last digit" if rounded else ""
    print(f"{title:55} {equal:2} equal{ending}{f', {len(apart)} differ' if apart else ''}")
    for key in apart:
        print(f"    {key:24} {_shown(old.get(key)):>28} → {_shown(numbers.get(key))}")
    return len(apart)


def put(section: dict[str, Any], numbers: dict[str, Any], said: dict[str, str]) -> dict[str, Any]:
    """A section with other numbers, and its reference with what is said of the rows."""
    head = {key: value for key, value in section.items() if key in ABOUT}
    for pattern, words in said.items():
        head["reference"] = re.sub(pattern, words, head["reference"])
    head["other_sources"] = {
        key: origin for key, origin in head.get("other_sources", {}).items() if key in numbers
    }
    if not head["other_sources"]:
        del head["other_sources"]
    return head | {key: numbers[key] for key in (*section, *numbers) if key in numbers}


def calibrate(name: str, parts: list[str], folder: Path, write: bool) -> int:
    """One GPU and the profiles that hold it; how many numbers differ from the shipped ones."""
    paths = [bundled_folder("hardware_profiles") / f"{one}.yaml" for one in (name, *ALIKE.get(name, ()))]
    shipped = [read_yaml(path)[0] for path in paths]
    differ = 0
    for part in parts:
        for keys, numbers, said in PARTS[part](name, folder):
            for path, data in zip(paths, shipped, strict=True):
                above = data
                for key in keys[:-1]:
                    above = above[key]
                title = f"{path.stem} {'.'.join(keys)}"
                differ += check(title, above[keys[-1]], numbers, GEMM_DIGITS if part == "gemm" else DIGITS)
                above[keys[-1]] = put(above[keys[-1]], numbers, said)
            sys.stdout.flush()
    if write:
        for path, data in zip(paths, shipped, strict=True):
            write_text(path, dump_yaml(data))
    return differ


def main() -> int:
    """Refit every measured GPU."""
    parser = argparse.ArgumentParser(description="refit the measured constants of the hardware profiles")
    parser.add_argument("folder", nargs="?", type=Path, default=DATA, help="published measurements")
    parser.add_argument("--only", choices=list(PARTS), help="one kind of kernel")
    parser.add_argument("--system", choices=[*SYSTEMS, MESH], help="one GPU, by its profile")
    parser.add_argument("--write", action="store_true", help="put the numbers into hardware_profiles/")
    given = parser.parse_args()
    began, differ = time.monotonic(), 0
    try:
        for name in [given.system] if given.system else [*SYSTEMS, MESH]:
            parts = [given.only] if given.only else list(PARTS)
            timed = ["collectives"] if name == MESH else list(PARTS)
            differ += calibrate(name, [part for part in parts if part in timed], given.folder, given.write)
    except MissingDataError as error:
        print(f"{error}\ngive their folder: python tests/bench/calibrate.py DATA_FOLDER", file=sys.stderr)
        return 1
    ending = ", and were written; sections derived from them stay as they are" if given.write and differ else ""
    print(f"\n{differ} numbers differ from those of the profiles{ending} ({time.monotonic() - began:.0f} s)")
    return int(bool(differ and not given.write))


if __name__ == "__main__":
    raise SystemExit(main())

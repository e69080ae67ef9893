"""Why one step is longer than another, from their parts."""

from __future__ import annotations

from collections.abc import Mapping

from planner.spec.estimate import StepTime

_NAMES = {
    "matmul": "matrix products", "tp": "tp exposed", "cp": "cp exposed", "ep": "ep exposed", "dp": "dp exposed",
    "pp": "pp exposed", "host": "waiting for the host", "recompute": "recompute for memory",
}  # fmt: skip
_ALIKE = 5e-4  # of a step
_MOST = 3  # parts that are named
_NOTABLE = 0.1  # of all that is longer, or shorter


def reason_of(best: StepTime, other: StepTime) -> str:
    """`6.1 % slower: bubble +5.0 %, tp exposed +1.9 % of a step`; shares are of the best step."""
    total = best.total_seconds
    change = {
        key.removesuffix("_seconds"): (seconds - best.parts[key]) / total for key, seconds in other.parts.items()
    }
    longer = _named({key: share for key, share in change.items() if share > 0.0}, "+")
    shorter = _named({key: -share for key, share in change.items() if share < 0.0}, "−")
    slower = other.total_seconds / total - 1.0
    offset = f", against {shorter}" if sum(share for share in change.values() if share < 0.0) < -slower else ""
    lead = f"as fast within {_percent(_ALIKE)}" if slower < _ALIKE else f"{_percent(slower)} slower"
    return f"{lead}: {longer}{offset} of a step" if longer else lead


def _named(shares: Mapping[str, float], sign: str) -> str:
    """The largest of them."""
    total = sum(shares.values())
    largest = sorted(
        (key for key, share in shares.items() if share > _NOTABLE * total), key=lambda key: -shares[key]
    )
    return ", ".join(f"{_NAMES.get(key, key)} {sign}{_percent(shares[key])}" for key in largest[:_MOST])


def _percent(share: float) -> str:
    percent = 100.0 * share
    return f"{percent:.2f} %" if percent < 0.95 else f"{percent:.1f} %" if percent < 99.5 else f"{percent:,.0f} %"

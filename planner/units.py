"""Units: SI inside the program; GB, GiB and the like only in files and on screen, always spelled."""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3

MB = 1000**2
GB = 1000**3

FP32_BYTES = 4.0  # what sums, statistics, losses and the state of an optimizer are kept in

_BYTES_PER_ELEMENT = {
    "fp64": 8.0,
    "fp32": FP32_BYTES,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "complex64": 8.0,
    "int64": 8.0,
    "int32": 4.0,
    "int16": 2.0,
    "int8": 1.0,
    "bool": 1.0,
}


def bytes_per_element(dtype: str) -> float:
    """Bytes one element takes in memory."""
    return _BYTES_PER_ELEMENT[dtype]


def in_binary_bytes(count: float) -> str:
    """Bytes for a screen: 1536 → '1.50 KiB'."""
    return _scaled(count, 1024.0, ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"))


def in_decimal(count: float, unit: str = "") -> str:
    """A count for a screen: 8.03e9 → '8.03 G'."""
    return _scaled(count, 1000.0, ("", "k", "M", "G", "T", "P", "E"), unit)


def in_billions(count: float) -> str:
    """Parameters the way people say them: 8_030_261_248 → '8.03 B', 124_439_808 → '124 M'."""
    if count >= 1e12:
        return f"{count / 1e12:.3g} T"
    if count >= 1e9:
        return f"{count / 1e9:.3g} B"
    if count >= 1e6:
        return f"{count / 1e6:.3g} M"
    return f"{count:.0f}"


def _scaled(count: float, step: float, prefixes: tuple[str, ...], unit: str = "") -> str:
    power = 0
    while abs(count) >= step and power < len(prefixes) - 1:
        count /= step
        power += 1
    # three digits, and never an exponent: 1000 MiB lies below 1 GiB
    digits = f"{count:.0f}" if power == 0 or abs(count) >= 99.95 else f"{count:.3g}"
    return f"{digits} {prefixes[power]}{unit}".rstrip()

"""Where results go: found out before anything is computed, so that no answer is lost for want of a place."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from planner.errors import PlannerError


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written, without touching what is there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if path.exists() and not path.is_file():  # a pipe or a device is written to, nothing stands beside it
            return
        beside = path.resolve().parent / f".{path.name[:50]}.{secrets.token_hex(8)}.part"
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        beside.unlink()
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a NUL in the name, a loop of links
        raise PlannerError(
            "the file cannot be written",
            value=f"{path}: {getattr(error, 'strerror', None) or error}",
            remedy="check the folder and its permissions",
            key="output",
        ) from None

"""Reading and writing the project's files: bounded reads, whole writes, and where bundled data lies."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.yaml_text import Source, parse_yaml
from planner.units import MB

_LARGEST_FILE_BYTES = 4 * MB


def read_yaml(path: Path) -> tuple[Any, Source]:
    """The data of a YAML file and where each key stands in it."""
    try:
        return parse_yaml(read_text(path), str(path))
    except PlannerError as error:
        error.key = error.key or "file"
        raise


def read_text(path: Path, largest_bytes: int = _LARGEST_FILE_BYTES) -> str:
    """A text file of a sane size, or a PlannerError."""
    try:
        with os.fdopen(_opened(path), "rb") as file:
            content = file.read(largest_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PlannerError(
            "the file cannot be read",
            value=f"{path}: {reason}",
            remedy="check the path and its permissions",
            key="file",
        ) from None
    if len(content) > largest_bytes:
        raise PlannerError(
            f"a file of at most {largest_bytes // MB} MB is read",
            value=str(path),
            remedy="give a specification, profile or plan, not a data file",
            key="file",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlannerError(
            "the file is not text in UTF-8",
            value=f"byte {error.start}",
            remedy="give a text file",
            key="file",
            where=str(path),
        ) from None


def require_apart(written: Mapping[str, str], read: Mapping[str, str]) -> None:
    """Refuse a file that is to be written where it is one that is read, or written for something else.

    Both are given by what they are, which is the flag of what is written; names that are no files are left out.
    """
    taken = {place: what for what, path in read.items() if (place := _place(path)) and place.is_file()}
    for key, path in written.items():
        place = _place(path)
        what = taken.setdefault(place, key) if place else key
        if what != key:
            raise PlannerError(
                f"the file that --{key} writes is one of its own",
                value=f"{path}, which is the {what} as well",
                remedy=f"give another file with --{key}",
                key=key,
            )


def _place(path: str) -> Path | None:
    """Without links; none of a name that can be no file's, which whoever opens it tells."""
    try:
        found = Path(path).resolve()
        found.is_file()
    except (OSError, ValueError, RuntimeError):  # too long; a NUL in the name; a loop of links
        return None
    return found if path else None


def _opened(path: Path) -> int:
    """A descriptor of a regular file. A pipe or device would make the usual open, or a read, wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise PlannerError(
        "a regular file is needed",
        value=str(path),
        remedy="give a file, not a folder, pipe or device",
        key="file",
    )


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader or a crash never sees half a file. Pipes and devices are written to."""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(path.resolve(), content)  # where path is a link, the file behind it
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a NUL in the name, a loop of links
        raise PlannerError(
            "the file cannot be written",
            value=f"{path}: {getattr(error, 'strerror', None) or error}",
            remedy="check the folder, its permissions and the space left",
            key="output",
        ) from None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.parent / f".{path.name[:50]}.{secrets.token_hex(8)}.part"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def bundled_folder(name: str) -> Path:
    """`model_specs` or `hardware_profiles`: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def bundled_names(folder: str) -> list[str]:
    """Names of the bundled specifications or profiles."""
    return sorted(path.stem for path in bundled_folder(folder).glob("*.yaml"))

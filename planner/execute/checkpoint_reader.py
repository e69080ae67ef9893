"""Tensors of a checkpoint as they were written: each is compared with the sum that torch keeps of it.

torch writes a tensor as a zip archive, with a CRC-32 of each of its members, and looks at none when it loads. So
the sums cost nothing to write, and every rank compares what it reads anyway.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystemReader

from planner.execute.checkpoint_folder import ALTERED


class Altered(ValueError):  # noqa: N818 - what was found, told from rank to rank
    """A tensor's bytes are others than those that were written."""


class SummedReader(FileSystemReader):
    """Reads each tensor once, and compares its sums before torch unpacks it."""

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        content = io.BytesIO(super()._slice_file(file, sinfo).read())
        if not sums_agree(content):
            raise Altered(
                f"{Path(self.path).name}/{sinfo.relative_path}: {ALTERED}, at byte {sinfo.offset:,} or after"
            )
        return content


def sums_agree(content: IO[bytes]) -> bool:
    """Whether an archive's members have the sums that it says; it is left at its start."""
    try:
        agree = zipfile.ZipFile(content).testzip() is None
    except Exception:  # altered lengths, names and flags fail in as many ways as there are fields
        return False
    content.seek(0)
    return agree

"""Checkpoints that any layout can go on from: weights and moments whole by their paths, written in parts.

`FOLDER/step-00000100/` holds the tensors, as torch.distributed.checkpoint writes them, and `run.json`. It is
written under another name, synced and renamed, and only then `FOLDER/latest` names it: a write that was cut short
spoils nothing. All nodes share the folder.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from planner.errors import PlannerError
from planner.execute.checkpoint_folder import (
    FACTS,
    LATEST,
    UNFINISHED,
    Facts,
    damaged,
    latest,
    name_of,
    sum_of,
    whole_step,
    written,
)
from planner.execute.checkpoint_items import PartLoadPlanner, Parts, PartSavePlanner
from planner.execute.checkpoint_reader import Altered, SummedReader
from planner.execute.failure import RunFailed
from planner.spec.codec import encode
from planner.spec.files import write_text

METADATA = ".metadata"  # torch's own: a pickle of where each tensor lies


class Checkpoints:
    """The checkpoints of a run in their folder. Every rank calls the same, in the same order.

    Ranks wait `seconds` for one another.
    """

    def __init__(self, folder: Path, *, keep: int, seconds: float) -> None:
        self.folder = folder
        self._keep = keep
        # a group of its own, so that writing meets no collective of a step; gloo, for it runs in a thread
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
        self._writing: threading.Thread | None = None
        self._failed: BaseException | None = None

    def latest(self) -> Facts | None:
        """Of the last whole checkpoint, if there is one."""
        return latest(self.folder)

    def load(self, facts: Facts, state: Parts) -> None:
        """Fill parts from a checkpoint, under whatever layout it was written; altered bits are refused."""
        path = self.folder / name_of(facts.step)
        root = logging.getLogger()
        level = root.level
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that ranks read different tensors, as they should in a pipeline
            root.setLevel(logging.CRITICAL)  # torch logs there, with a traceback, what it raises as well
            try:
                load(
                    dict(state),
                    storage_reader=SummedReader(path),
                    planner=PartLoadPlanner(),
                    process_group=self._group,
                )
            except CheckpointException as error:
                cause = _first(error)
                if isinstance(cause, Altered):
                    raise damaged(self.folder, path, str(cause)) from None
                remedy = f"write the name of an earlier one into {self.folder / LATEST}, or give another folder"
                raise _cause(error, f"the checkpoint {path} can be read", remedy) from None
            finally:
                root.setLevel(level)

    def save(self, facts: Facts, state: Parts, *, wait: bool = False) -> None:
        """Copy the parts and write them beside the run; the one before is waited for, and so is this if asked."""
        self.finish()
        copies = {path: tuple(part.copied() for part in held) for path, held in state.items()}
        self._writing = threading.Thread(target=self._write, args=(facts, copies), name="checkpoint", daemon=True)
        self._writing.start()
        if wait:
            self.finish()

    def raise_failure(self) -> None:
        """Tell of a write that has failed meanwhile."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise self._told(failed)

    def finish(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self.raise_failure()

    def _write(self, facts: Facts, state: Parts) -> None:
        final = self.folder / name_of(facts.step)
        beside = self.folder / f"{final.name}{UNFINISHED}"
        first = dist.get_rank() == 0
        try:
            save(
                dict(state),
                storage_writer=FileSystemWriter(beside),
                planner=PartSavePlanner(),
                process_group=self._group,
            )
            if first:
                sizes = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
                told = replace(facts, files=sizes, sums={METADATA: sum_of(beside / METADATA)})
                write_text(beside / FACTS, json.dumps(encode(told)) + "\n")
                _sync(beside)
                shutil.rmtree(final, ignore_errors=True)
                beside.rename(final)
                _sync(self.folder)
                write_text(self.folder / LATEST, final.name + "\n")
                self._remove_old(final)
        except BaseException as error:  # CheckpointException is one that `Exception` does not catch
            if first:
                shutil.rmtree(beside, ignore_errors=True)  # its space may be what the next one lacks
            self._failed = error  # last: who reads it ends the run, and this thread with it

    def _remove_old(self, newest: Path) -> None:
        before = [path for path in written(self.folder) if path.name < newest.name]
        for path in before[self._keep - 1 :]:
            shutil.rmtree(path, ignore_errors=True)

    def _told(self, error: BaseException) -> BaseException:
        step = whole_step(self.folder)
        kept = f"the one of step {step} is whole" if step else "there is none before it"
        return _cause(
            error, f"a checkpoint can be written to {self.folder}", f"free space there, then --resume; {kept}"
        )


def _sync(folder: Path) -> None:
    """What a folder lists survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first(error: BaseException) -> BaseException:
    """What the first of the ranks that failed had met."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return error


def _cause(error: BaseException, rule: str, remedy: str) -> PlannerError:
    """The first reason of a failure that ranks told one another, the tracebacks left out."""
    error = _first(error)
    if isinstance(error, PlannerError):
        return error
    told = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return RunFailed(rule, value=told, remedy=remedy, key="checkpoint")

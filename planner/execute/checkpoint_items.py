"""Parts of weights as torch.distributed.checkpoint writes and reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from planner.errors import PlannerError
from planner.execute.parts import Part

Parts = dict[str, tuple[Part, ...]]  # what a rank holds of each tensor


class PartSavePlanner(DefaultSavePlanner):
    """Writes each part at its place of the whole; of equal parts on several ranks torch writes one."""

    state_dict: Parts

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """What this rank could write."""
        self.plan = SavePlan([_written(path, part) for path, held in self.state_dict.items() for part in held])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of a part."""
        return _at(self.state_dict, index)


class PartLoadPlanner(DefaultLoadPlanner):
    """Reads into each part whatever written parts overlap with it."""

    state_dict: Parts

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Before the plan is made."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads; a PlannerError where the checkpoint has no such tensor."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for path, held in self.state_dict.items():
            kept, whole = self.metadata.state_dict_metadata.get(path), held[0].whole
            if not isinstance(kept, TensorStorageMetadata) or tuple(kept.size) != whole:
                found = "none" if not isinstance(kept, TensorStorageMetadata) else f"one of {list(kept.size)}"
                raise PlannerError(
                    f"the checkpoint has a tensor {path} of {list(whole)}",
                    value=found,
                    remedy="resume with the model and the optimizer that wrote it",
                    key="checkpoint",
                )
            items += create_read_items_for_chunk_list(path, kept, [_box(part) for part in held])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the values of a part go."""
        return _at(self.state_dict, index)


def _at(parts: Parts, index: MetadataIndex) -> Tensor:
    """The part that torch means: no two of a tensor begin at one place."""
    return next(part.tensor for part in parts[index.fqn] if part.offsets == tuple(index.offset or ()))


def _box(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offsets), sizes=torch.Size(part.sizes))


def _written(path: str, part: Part) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(path, torch.Size(part.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_box(part),
            properties=TensorProperties.create_from_tensor(part.tensor),
            size=torch.Size(part.whole),
        ),
    )

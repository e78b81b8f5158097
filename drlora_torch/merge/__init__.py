"""Merging the LoRA into the experts: in place, or into a checkpoint."""

from drlora_torch.merge.in_place import merge, unmerge
from drlora_torch.merge.report import MergeReport
from drlora_torch.merge.saving import merge_and_save

__all__ = ["MergeReport", "merge", "merge_and_save", "unmerge"]

"""The merged model of a run with its tokenizer, ready to be served."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from drlora_core import atomic
from drlora_torch.errors import CheckpointError
from drlora_torch.finetune.after.opened import Opened
from drlora_torch.merge.report import MergeReport


def write_merged(opened: Opened, target: Path, *, quantize: bool, compare: bool) -> MergeReport:
    """Write model and tokenizer to a folder.

    Args:
        opened: the run.
        target: a new or empty folder.
        quantize: pack experts of 4 bits again.
        compare: run the written model beside the trained one.

    Raises:
        DRLoRAError: as :meth:`drlora_torch.Adapter.merge_and_save`, or the tokenizer cannot be
            written; nothing is written then.
    """
    with atomic.replaced_files(target) as part:
        try:
            opened.tokenizer.save_pretrained(part)
        except OSError:
            raise
        except Exception as error:  # of the library in Rust, a plain one
            raise CheckpointError(f"could not write the tokenizer to {target}: {error}") from error
        try:
            report = opened.adapter.merge_and_save(part, quantize=quantize, compare=compare)
        except CheckpointError as error:  # it knows the temporary folder alone
            raise CheckpointError(str(error).replace(str(part), str(target))) from error
    return dataclasses.replace(report, path=target)


def describe(report: MergeReport, packed: bool) -> str:
    """Say what was written, what rounding has done to the update, and how to load it."""
    lines = [
        f"{report.path}: merged model with its tokenizer; experts in {report.storage}",
        f"rounding has changed the update by {report.rounding:.2%}",
    ]
    if report.rounding > 1:
        lines[-1] += ", which is more than the training has: use a wider --dtype in a new run"
    if report.logits_error is not None:
        lines.append(
            f"its logits differ from those of the trained model by {report.logits_error:.2%}; "
            f"those of the base model by {report.logits_effect:.2%}"
        )
    first = "import drlora_torch; " if packed else ""
    path = str(report.path)
    lines += [
        "Load it:",
        f"  {first}AutoModelForCausalLM.from_pretrained({path!r})  # in Python",
    ]
    lines += [] if packed else [f"  vllm serve {shlex.quote(path)}"]
    return "\n".join(lines)

"""The command line's words for the options of a run, one alias per option."""

# typer reads these annotations at run time, where Python 3.10 wants Optional.
# ruff: noqa: UP045

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

from typer import Argument, Option

Model = Annotated[
    Optional[str], Argument(help="Hugging Face id or local folder of a mixture-of-experts model.")
]
Data = Annotated[
    Optional[str],
    Argument(
        help="A .jsonl, .json or .txt file, or a dataset id, with columns text, "
        "prompt and completion, or messages."
    ),
]
Output = Annotated[
    Optional[Path], Option(help="Folder for the run; must not exist (default: runs/<time>).")
]
Resume = Annotated[
    Optional[Path], Option(help="Go on with the run in this folder, with its own options.")
]
Compare = Annotated[
    Optional[Literal["uniform"]], Option(help="Train static LoRA at the same budget too.")
]
EvalData = Annotated[Optional[str], Option(help="Held-out rows, in the same forms as DATA.")]
EvalFraction = Annotated[
    Optional[float],
    Option(help="Share of DATA to hold out if nothing else is held out (default: 0.05)."),
]
Steps = Annotated[Optional[int], Option(help="Optimizer steps (default: 200).")]
BatchSize = Annotated[Optional[int], Option(help="Rows per device and pass (default: 16).")]
Accumulation = Annotated[Optional[int], Option(help="Passes per optimizer step (default: 1).")]
LearningRate = Annotated[
    Optional[float], Option(help="Peak rate of AdamW (default: 2e-4; shipped model: 5e-3).")
]
MaxLength = Annotated[
    Optional[int], Option(help="Longest row in tokens (default: 512; shipped model: 128).")
]
Seed = Annotated[Optional[int], Option(help="Seed of data order, A and policy (default: 0).")]
Dtype = Annotated[
    Optional[Literal["auto", "float32", "bfloat16", "float16"]],
    Option(help="Of the base model; auto is the checkpoint's, float32 on a CPU."),
]
RInit = Annotated[
    Optional[int], Option(help="Rank of every expert at the start (default: 8; shipped model: 2).")
]
RTarget = Annotated[
    Optional[int],
    Option(help="Mean rank at the end, the budget (default: 16; shipped model: 4)."),
]
RMax = Annotated[
    Optional[int], Option(help="Largest rank of one expert (default: 32; shipped model: 12).")
]
Alpha = Annotated[
    Optional[float], Option(help="Scaling is alpha / r_target (default: 2 * r_target).")
]
Gamma = Annotated[Optional[float], Option(help="Exponent of the rank penalty (default: 1).")]
Timetable = Annotated[
    Optional[Literal["early", "late"]],
    Option(help="Growth between 5 and 25 % of the steps (early, default) or 10 and 60 % (late)."),
]
WarmupSteps = Annotated[Optional[int], Option(help="Steps before growth (default: by timetable).")]
GrowthInterval = Annotated[
    Optional[int], Option(help="Steps between growth events (default: for 8 events).")
]
GrowthEnd = Annotated[Optional[int], Option(help="Last step of growth (default: by timetable).")]
MaxGrowth = Annotated[
    Optional[int],
    Option(help="Most rank per expert and event (default: r_max is reached at the last event)."),
]
Policy = Annotated[
    Optional[Literal["greedy", "rescored", "proportional", "random", "uniform", "prune"]],
    Option(help="How a quota is spread over the experts (default: greedy)."),
]
Scope = Annotated[
    Optional[Literal["layer", "global"]],
    Option(help="A quota per layer, or one over all (default: layer)."),
]
Router = Annotated[
    Optional[Literal["frozen", "after_warmup", "trainable"]],
    Option(help="Whether the routers learn (default: frozen)."),
]
SlotLayout = Annotated[
    Optional[Literal["pooled", "masked"]],
    Option("--layout", help="Storage of the rank slots (default: pooled)."),
]
Dropout = Annotated[Optional[float], Option(help="Of the LoRA's inputs (default: 0).")]
GradientCheckpointing = Annotated[
    bool, Option("--gradient-checkpointing", help="Trade time for memory.")
]
SaveEvery = Annotated[
    Optional[int], Option(help="Steps between checkpoints (default: a quarter of the steps).")
]

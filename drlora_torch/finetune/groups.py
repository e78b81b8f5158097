"""The fields of a recipe in groups: type, default, range and help text, each declared once.

The command line shows one panel for each group.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from drlora_core.bounds import ALPHA_BOUND, GAMMA_BOUND, RANK_BOUND, STEP_BOUND, at_most
from drlora_core.config import PolicyName, ScopeName, TimetableName
from drlora_torch.finetune.words import parse_names, parse_pairs

RUN_BOUND = at_most(10**9, "at 1,000 steps a second they take 12 days")
EPOCH_BOUND = at_most(1e6, "no data is read so often")
SHARE_BOUND = at_most(2**20, "no step has so many forward passes")
LENGTH_BOUND = at_most(2**24, "no model reads so many tokens at once")
Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(parse_names), Field(min_length=1)]
Pairs = Annotated[dict[str, str], BeforeValidator(parse_pairs)]


class Group(BaseModel):
    """Fields that belong together."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    panel: ClassVar[str] = "Other"


class ModelGroup(Group):
    """What is trained, and how its weights are stored."""

    panel: ClassVar[str] = "Model"

    model: Text
    """Hugging Face id or local folder of a mixture-of-experts model."""
    adapter: Text | None = None
    """Start from this adapter: a run, a folder of drlora with its ranks, or one of PEFT."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model; auto is float32 on a CPU and that of the checkpoint on a GPU."""
    load_in_4bit: bool = False
    """Load the experts and the Linears of the rest in NF4, with bitsandbytes."""
    quantization: Literal["none", "nf4", "fp4", "fp8", "mxfp4"] = "none"
    """How the experts are stored: as they are loaded (none), packed while loading (nf4, fp4), or
    packed as the checkpoint has them (fp8, mxfp4)."""


class DataGroup(Group):
    """What it is trained on."""

    panel: ClassVar[str] = "Data"

    data: Text
    """Training data: a file (.jsonl, .json, .csv, .parquet, .txt, each also .gz), a folder of such
    files, or a dataset id. Columns: text; prompt and completion; messages; conversations; question
    and answer; instruction, input and output; for --method dpo: chosen and rejected, with or
    without prompt. In a .txt file, blank lines separate the rows."""
    eval_data: Text | None = None
    """Held-out data, in the same formats as DATA. If not given, the validation or test split of
    DATA, or a random part of it."""
    split: Text = "train"
    """Split of DATA to train on, where it has several."""
    eval_fraction: float = Field(0.05, gt=0.0, lt=1.0)
    """Fraction of DATA to hold out if it has no split for it."""
    columns: Pairs | None = None
    """Which columns to read, FIELD=COLUMN,...: prompt=question,completion=answer."""
    chat_template: Text | None = None
    """File with the chat template (Jinja) to use instead of the tokenizer's."""
    train_on: Literal["answers", "all"] = "answers"
    """Tokens that bear loss: completions and assistant turns (answers), or all."""
    max_length: Annotated[int, LENGTH_BOUND] = Field(512, ge=2)
    """Longest row in tokens; the rest is cut off."""
    packing: bool = False
    """Put several rows into one sequence of max_length; they do not see each other."""
    streaming: bool = False
    """Read DATA while training, for what does not fit into memory; needs --steps and, without a
    split for it, --eval-data."""


class RankGroup(Group):
    """How many ranks the experts get, and when."""

    panel: ClassVar[str] = "Ranks of the experts"

    r_init: Annotated[int | None, RANK_BOUND] = Field(None, ge=0)
    """Rank of every expert at the start. If not given, 1 with timetable sprout, else half
    of r_target; twice r_target with policy prune."""
    r_target: Annotated[int, RANK_BOUND] = Field(16, ge=1)
    """Mean rank at the end, which is the budget."""
    r_max: Annotated[int, RANK_BOUND] = Field(32, ge=1)
    """Largest rank of one expert."""
    alpha: Annotated[float | None, ALPHA_BOUND] = Field(None, gt=0.0)
    """Scale the LoRA update by alpha / r_target. If not given, 2 * r_target."""
    gamma: Annotated[float, GAMMA_BOUND] = Field(1.0, ge=0.0)
    """Exponent of the rank penalty in the saliency."""
    timetable: TimetableName = "sprout"
    """Ranks grow between 5 and 25 % (sprout, early) or 10 and 60 % (late) of the steps. With sprout
    they start at 1."""
    warmup_steps: Annotated[int | None, STEP_BOUND] = Field(None, ge=0)
    """Optimizer steps before growth. If not given, by the timetable."""
    growth_interval: Annotated[int | None, STEP_BOUND] = Field(None, ge=1)
    """Optimizer steps from one growth event to the next. If not given, as many as make at most 8
    events."""
    growth_end: Annotated[int | None, STEP_BOUND] = Field(None, ge=0)
    """Last optimizer step of growth. If not given, by the timetable."""
    max_growth: Annotated[int | None, STEP_BOUND] = Field(None, ge=1)
    """Most ranks that an expert gains per event. If not given, an expert that wins every event
    reaches r_max at the last one."""
    policy: PolicyName = "greedy"
    """How the new ranks go to the experts; move also takes ranks from experts, prune only takes."""
    move_share: float = Field(0.2, ge=0.0, le=1.0)
    """Policy move: largest share of a layer's ranks that the first event moves."""
    r_min: Annotated[int, RANK_BOUND] = Field(1, ge=0)
    """Policies prune and move: least rank that they leave an expert."""
    scope: ScopeName = "layer"
    """Whether each layer has a quota of its own or all layers share one."""
    importance: Literal[
        "sensitivity", "sensitivity_per_token", "fisher", "gradient", "update_norm"
    ] = "sensitivity"
    """What tells how important an expert's ranks are."""
    routing: Literal["weight", "margin", "count"] = "weight"
    """What a selected expert counts: its routing weight, that minus the smallest selected one of
    the token, or 1."""
    layout: Literal["pooled", "masked"] = "pooled"
    """Storage of the ranks: shared by the experts (pooled) or r_max for each (masked)."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability on the LoRA inputs."""


class RestGroup(Group):
    """What else is trained."""

    panel: ClassVar[str] = "Rest of the model"

    attention_rank: Annotated[int | None, RANK_BOUND] = Field(None, ge=1)
    """Rank of LoRA in attention, shared experts and dense layers. If not given, they are frozen."""
    attention_alpha: Annotated[float | None, ALPHA_BOUND] = Field(None, gt=0.0)
    """Scale that LoRA by attention_alpha / attention_rank. If not given, 2 * attention_rank."""
    attention_targets: Names | None = None
    """Names of the Linears that get it, such as q_proj,v_proj. If not given, all of them."""
    modules_to_save: Names | None = None
    """Modules that are trained whole, such as lm_head,embed_tokens."""
    router: Literal["frozen", "after_warmup", "trainable"] = "frozen"
    """Whether the routers are trained; after_warmup: from step warmup_steps on."""


class TrainingGroup(Group):
    """How it is trained; options of the Trainer under shorter names."""

    panel: ClassVar[str] = "Training"

    method: Literal["sft", "dpo"] = "sft"
    """Learn to write the answers (sft), or to prefer the chosen ones (dpo)."""
    beta: float = Field(0.1, gt=0.0)
    """How much dpo holds on to the base model."""
    steps: Annotated[int | None, RUN_BOUND] = Field(None, ge=1)
    """Optimizer steps. If neither steps nor epochs are given, 200. With --resume: to this step."""
    epochs: Annotated[float | None, EPOCH_BOUND] = Field(None, gt=0.0)
    """Passes over DATA, instead of steps."""
    batch_size: int = Field(16, ge=1, le=2**20)
    """Rows per device and forward pass."""
    accumulation: Annotated[int, SHARE_BOUND] = Field(1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(2e-4, gt=0.0)
    """Peak learning rate."""
    lr_scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_restarts",
    ] = "cosine"
    """How the learning rate changes after its warmup."""
    warmup_ratio: float = Field(0.05, ge=0.0, lt=1.0)
    """Fraction of the steps in which the learning rate rises; not with constant."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of the optimizer."""
    optimizer: Literal[
        "adamw_torch_fused",
        "adamw_torch",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "adafactor",
        "rmsprop",
        "sgd",
        "schedule_free_adamw",
    ] = "adamw_torch_fused"
    """Optimizer, by the Trainer's names."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Clip the norm of the gradients at this; 0 does not."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the data order, the rows of A and the policy."""


class WatchGroup(Group):
    """What is measured, kept and reported on the way."""

    panel: ClassVar[str] = "Evaluation, checkpoints, reports"

    eval_every: Annotated[int | None, STEP_BOUND] = Field(None, ge=1)
    """Optimizer steps between evaluations. If not given, before and after the training only."""
    patience: Annotated[int | None, STEP_BOUND] = Field(None, ge=1)
    """Stop after this many evaluations without a lower held-out loss, and keep the best; needs
    --eval-every, at which checkpoints are written then."""
    save_every: Annotated[int | None, STEP_BOUND] = Field(None, ge=1)
    """Optimizer steps between checkpoints. If not given, a quarter of the steps."""
    report_to: Names | None = None
    """Where metrics go beside the run's folder, by the Trainer's names: tensorboard, wandb, ..."""
    run_name: Text | None = None
    """Name of the run there. If not given, that of its folder."""

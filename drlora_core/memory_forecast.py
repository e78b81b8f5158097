"""How much memory a training run takes, part by part, from a model's shape alone.

The bytes of weights, LoRA, gradients and optimizer state are exact; those of activations are an
estimate. A run with several processes, and what its libraries take, are not covered.

Symbols: N experts, n values of one weight of one expert, T tokens of one forward and backward,
k experts per token, L decoder layers, H hidden size, V vocabulary, b bytes of a number.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from drlora_core.config import AllocatorConfig
from drlora_core.model_shape import LayerShape, ModelShape

DType = Literal["float32", "bfloat16", "float16"]
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
Quantization = Literal["none", "nf4", "fp4", "fp8", "mxfp4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4", "fp4", "fp8", "mxfp4")
Kernel = Literal["grouped", "ragged"]
KERNELS: tuple[Kernel, ...] = ("grouped", "ragged")
BLOCK = 64  # values that share a scale in NF4 and FP4
NESTED_BLOCK = 256  # scales of an expert that share a scale of their own (double quantization)
FP8_TILE = 128  # rows, and columns, of values that share a scale
MXFP4_GROUP = 32  # values of a row that share a scale of one byte
GROUP_BYTES = 2**30  # that kernel grouped unpacks at once, at most, if an expert is not larger
ATTENTION = 7.5  # numbers that a token's attention and norms keep, over H; see `activation_bytes`
LOSS = 12  # bytes of a logit: three numbers in float32
KEPT = {"grouped": 0.7, "ragged": 0.7}  # numbers that a pair keeps, over the sum of in + out
WORKING = {"grouped": 2.2, "ragged": 1.4}  # the same at the peak of the layer's backward


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What of a run decides its memory, beside the ranks."""

    lora_dtype: DType = "float32"
    quantization: Quantization = "none"
    """How the expert weights are stored."""
    double_quant: bool = True
    """Whether the scales of NF4 and FP4 are quantized too."""
    base_dtype: DType = "bfloat16"
    """Data type of the rest of the base, of experts that are not quantized, and of activations."""
    kernel: Kernel = "grouped"
    """Which code multiplies the experts: ``grouped`` on GPUs, ``ragged`` on CPUs."""
    tokens: int = 2048
    """T, tokens of one forward and backward."""
    checkpointing: bool = True
    """Gradient checkpointing of every decoder layer."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes of a run with AdamW and layout ``pooled``."""

    options: RunOptions
    experts: int
    rest: int | None
    """Of the base model without the experts; None if its parameters are not known."""
    lora: int
    gradients: int
    optimizer: int
    unpacked: int
    """Expert weights that are unpacked at one time."""
    activations: int | None
    """None if the shape does not say how many experts a token has, or the sizes of the model."""
    total: int
    """Sum of what is known."""


def forecast(shape: ModelShape, config: AllocatorConfig, options: RunOptions) -> MemoryForecast:
    """Forecast the memory of a run.

    Example:
        >>> layer = LayerShape(0, 8, {"gate_up_proj": (64, 64), "down_proj": (32, 64)})
        >>> shape = ModelShape("tiny", 1, (layer,), total_parameters=60_000)
        >>> made = forecast(shape, AllocatorConfig(), RunOptions(quantization="nf4"))
        >>> made.experts, made.rest, made.lora, made.total
        (25472, 21696, 114688, 571456)
    """
    experts = sum(expert_bytes(layer, options) for layer in shape.layers)
    lora = BYTES[options.lora_dtype] * lora_parameters(shape, config.mean_rank_ceiling)
    rest = rest_parameters(shape)
    parts = {
        "experts": experts,
        "rest": None if rest is None else rest * BYTES[options.base_dtype],
        "lora": lora,
        "gradients": lora,
        "optimizer": 2 * lora,  # both moments; in PyTorch they have the dtype of the parameter
        "unpacked": max((unpacked_bytes(layer, options) for layer in shape.layers), default=0),
        "activations": activation_bytes(shape, options),
    }
    total = sum(size for size in parts.values() if size is not None)
    return MemoryForecast(options=options, **parts, total=total)  # type: ignore[arg-type]


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Numbers of A and B of all layers, with ``rank`` slots per expert."""
    return rank * sum(layer.num_experts * layer.slot_parameters for layer in shape.layers)


def rest_parameters(shape: ModelShape) -> int | None:
    """Parameters of the model that are no expert weights; None if they are not known."""
    if shape.total_parameters is None:
        return None
    return shape.total_parameters - sum(layer.expert_parameters for layer in shape.layers)


def expert_bytes(layer: LayerShape, options: RunOptions) -> int:
    """Bytes of the weights of all experts of a layer, with their scales."""
    return layer.num_experts * sum(
        weight_bytes(outer, inner, options) for inner, outer in layer.projections.values()
    )


def weight_bytes(rows: int, columns: int, options: RunOptions) -> int:
    """Bytes of one weight [out, in] of one expert, with its scales.

    NF4 and FP4: ceil(n / 2) of codes, and b = ceil(n / 64) scales: 4 b, or with double quantization
    b + 4 ceil(b / 256) + 4 (its mean). FP8: n, and 4 for every tile of 128 x 128. MXFP4: 17 for
    every 32 values of a row.

    Example:
        >>> weight_bytes(1536, 2048, RunOptions(quantization="nf4")) / (1536 * 2048)
        0.515870...
    """
    count = rows * columns
    if options.quantization in ("nf4", "fp4"):
        blocks = -(-count // BLOCK)
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if options.double_quant else 4 * blocks
        return -(-count // 2) + scales
    if options.quantization == "fp8":
        return count + 4 * -(-rows // FP8_TILE) * -(-columns // FP8_TILE)
    if options.quantization == "mxfp4":
        return rows * -(-columns // MXFP4_GROUP) * (MXFP4_GROUP // 2 + 1)
    return count * BYTES[options.base_dtype]


def unpacked_bytes(layer: LayerShape, options: RunOptions) -> int:
    """Bytes of the weights of a layer that are unpacked at once; 0 if they are not packed.

    Kernel ``ragged`` unpacks one expert. Kernel ``grouped`` unpacks as many as fit into 1 GiB, and
    at least one. MXFP4 needs an index of 4 bytes for every two values as well.
    """
    if options.quantization == "none":
        return 0
    size = BYTES[options.base_dtype]
    largest = max(inner * outer for inner, outer in layer.projections.values())
    at_once = 1
    if options.kernel == "grouped":
        at_once = min(layer.num_experts, max(1, GROUP_BYTES // (largest * size)))
    return at_once * largest * (size + 2 * (options.quantization == "mxfp4"))


def activation_bytes(shape: ModelShape, options: RunOptions) -> int | None:
    """Estimate the bytes of activations at their peak; None if a size is not known.

    A token has 7.5 H numbers in attention and norms of a layer (Korthikanti et al., arXiv
    2205.05198, section 4, without dropout and without a matrix of attention scores). A pair of a
    token and an expert has c (in + out), summed over the projections; c was measured for each
    kernel on small models: while the layer waits for its backward (``KEPT``), and in it
    (``WORKING``). The loss has 12 V bytes a token: logits, their logarithms and their gradient in
    float32. With gradient checkpointing, a layer keeps its input alone and is computed again:

        L T H b + max(12 T V, attention + working), of the largest layer

    and without:

        sum of (attention + kept) over the layers + max(12 T V, working - kept)

    Tests hold this to within a third of the bytes that real steps of small models allocate.
    """
    hidden, vocabulary, chosen = shape.hidden_size, shape.vocab_size, shape.experts_per_token
    if hidden is None or vocabulary is None or chosen is None:
        return None
    numbers = options.tokens * BYTES[options.base_dtype]
    attention = ATTENTION * hidden
    experts = [chosen * layer.slot_parameters for layer in shape.layers]
    largest, loss = max(experts, default=0), LOSS * options.tokens * vocabulary
    kept, working = KEPT[options.kernel], WORKING[options.kernel]
    if options.checkpointing:
        recomputed = numbers * (attention + working * largest)
        return math.ceil(numbers * shape.num_layers * hidden + max(loss, recomputed))
    waiting = numbers * (shape.num_layers * attention + kept * sum(experts))
    return math.ceil(waiting + max(loss, numbers * (working - kept) * largest))

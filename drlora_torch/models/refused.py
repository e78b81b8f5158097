"""Experts that cannot be adapted: listed with the reason, so that no model is adapted by half."""

from __future__ import annotations

from torch import nn

from drlora_torch.models.convention import dotted_name

REASONS = {
    "transformers.models.doge.modeling_doge.DogeCDMoE": (
        "an expert is one row of an embedding, retrieved by its index: a matrix of rank 1 has no "
        "low-rank update"
    ),
    "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseNaiveMoe": (
        "the caller chooses one expert per image (dataset_index): there is no router and no "
        "routing weight to allocate ranks by"
    ),
    "transformers.integrations.mxfp4.Mxfp4GptOssExperts": (
        "the kernels of Transformers have its weights in a layout of their own (MXFP4); keep the "
        "blocks of the checkpoint as they are: from_pretrained(name, "
        "config=drlora_torch.packed_config(name)), or unpack the model: "
        "quantization_config=Mxfp4Config(dequantize=True)"
    ),
    "transformers.integrations.gguf.utils.GgufExperts": (
        "its experts are blocks of GGUF, which only their kernels read; unpack the model: "
        "quantization_config=GgufConfig(dequantize=True), and pack the experts with "
        "drlora_torch.quantize_experts(model)"
    ),
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Llama4TextExperts": (
        "its experts are quantized (fp8) and multiplied by kernels that cannot add a LoRA; load "
        "the model in a floating-point dtype, without quantization_config"
    ),
}
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Say why experts without a convention cannot be adapted; None if they are no experts.

    A container called ``experts`` counts as experts: what its block does with it is not known.
    """
    for kind in type(module).__mro__:
        if dotted_name(kind) in REASONS:
            return REASONS[dotted_name(kind)]
    parent, _, own_name = name.rpartition(".")
    if own_name != "experts" or not isinstance(module, CONTAINERS) or len(module) < 2:
        return None
    block = dotted_name(type(model.get_submodule(parent)))
    return (
        f"drlora does not know its block, {block}; declare the class with "
        "drlora_torch.register_moe (see docs/adding_a_model.md)"
    )

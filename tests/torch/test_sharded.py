"""Adapters that processes hold together: what is refused, and traps of sharded parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

pytest.importorskip("peft")
pytest.importorskip("transformers.distributed")

from safetensors import safe_open
from torch import Tensor, multiprocessing

import drlora_torch
from drlora_torch.lora import parts
from tests.torch import helpers, models
from tests.torch.launches import launches
from tests.torch.sharded import SIGNALS, Said, attached, build, measure, profile, worker

REFUSED = {
    "left out": "AttachError: the processes train apart",
    "two left out": "AttachError: fully_shard has left out 2 of 8 LoRA parameters",
    "columns": "AttachError: model.layers.0.mlp.experts/gate_up_proj/lora_A has the placements",
    "early optimizer": "AttachError: the AdamW holds the LoRA of adapter 'default' as it was",
    "routers left out": "AttachError: model.layers.0.mlp.gate.weight learns, but fully_shard has",
    "small group": "AttachError: process_group has the processes [",
    "merge": "AttachError: merge needs the whole model in one process",
    "merge after a forward": "AttachError: merge needs the whole model in one process",
    "merge_and_save": "AttachError: merge_and_save needs the whole model in one process",
    "export_peft": "AttachError: export_peft needs the whole model in one process",
    "import_peft": "AttachError: import_peft needs the whole model in one process",
    "foreign": "AttachError: the experts of 'model.layers.0.mlp.experts' are DTensors with the",
    "pipeline": "AttachError: the model is cut into stages of a pipeline (pp_size=2)",
    "other tables": "CheckpointError: save_pretrained: the processes hold an adapter together, but",
    "no folder": "CheckpointError: ",
    "not finite": "NotFiniteError: model.layers.0.mlp.experts/gate_up_proj/lora_A holds values",
}


def refused_in_all_processes(folder: Path, both: list[Said]) -> None:
    for said in both:
        assert {name: said[name][: len(text)] for name, text in REFUSED.items()} == REFUSED


def one_process_that_saves_alone_ends_all(folder: Path, both: list[Said]) -> None:
    first, second = (said["alone"] for said in both)
    assert first.startswith("CheckpointError: save_pretrained needs all processes")
    assert second  # the first one is gone
    assert not (folder / "alone").exists()


def a_refused_action_does_no_harm(folder: Path, both: list[Said]) -> None:
    for said in both:
        assert said["trained after"] == ""
        assert said["good"]
        assert said["again"]
        assert said["is sharded"]


def a_dropped_batch_does_not_count(folder: Path, both: list[Said]) -> None:
    for said in both:
        for in_place in (False, True):
            assert said[f"tokens of a dropped batch, {in_place}"] == 2 * [2 * [4 * 7]]


def late_statistics_decide_the_same(folder: Path, both: list[Said]) -> None:
    for said in both:
        for name in ("sharded", "parallel"):
            assert said[f"late, {name}"] == (True, True, 2), name


def trial_steps_do_not_count(folder: Path, both: list[Said]) -> None:
    for said in both:
        assert said["trial steps"] == [0, 0]


def gathered_copies_are_not_taken_for_parameters(folder: Path, both: list[Said]) -> None:
    with torch.no_grad():
        ids = models.tokens(4, 7, 0)
        base = build()
        plain = base(input_ids=ids).logits
        drlora_torch.load(base, folder / "gathered")
        trained = base(input_ids=ids).logits
    assert (trained - plain).abs().max() > 1e-3
    for said in both:
        assert said["disabled and back"]
        assert said["held together"]
        assert said["restored"]
        torch.testing.assert_close(said["base"], plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(said["logits"], trained, rtol=1e-12, atol=1e-12)


def float32_lora_beside_bfloat16(folder: Path, both: list[Said]) -> None:
    for name in ("bfloat16 base", "mixed precision"):
        (dtypes, events, first), (_, _, second) = (said[name] for said in both)
        assert dtypes == {torch.float32}
        assert events == 1
        for mine, theirs in zip(first, second, strict=True):
            assert torch.equal(mine, theirs)


def several_adapters_take_turns(folder: Path, both: list[Said]) -> None:
    for said in both:
        assert said["first again"]
        assert said["first alone"]
        assert said["steps of both"] == (7, 5)


def all_tokens_on_the_experts_of_one_process(folder: Path, both: list[Said]) -> None:
    first, second = both
    parallel = {name: first[f"one side, {name}"] for name in ("ep", "tp")}
    for by_ep, by_tp in zip(parallel["ep"], parallel["tp"], strict=True):
        for layer, (phi, s) in by_ep.items():
            used = phi.nonzero()[0]
            assert len(used) == 2
            assert used.max() < 4 or used.min() >= 4  # experts of one process
            assert set(s.sum(axis=1).nonzero()[0]) <= set(used)
            assert (phi == by_tp[layer][0]).all()  # ties: for all rows
    assert str(first["one side, ep"]) == str(second["one side, ep"])
    assert parallel["ep"][-1]["model.layers.0.mlp.experts"][1].max() > 0


def saved_beside_others(folder: Path, both: list[Said]) -> None:
    for name in ("in peft", "by transformers"):
        assert (folder / name / "drlora_adapter.safetensors").is_file()
    with safe_open(folder / "by transformers" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys
    assert not [key for key in keys if "drlora" in key]


def a_state_that_others_have_gathered_is_saved_whole(folder: Path, both: list[Said]) -> None:
    one, two = (
        drlora_torch.load(models.build(dtype=torch.float64), folder / name)
        for name in ("good", "gathered by others")
    )
    assert helpers.rank_history(one) == helpers.rank_history(two)
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def a_profile_is_that_of_one_process(folder: Path, both: list[Said]) -> None:
    alone = profile(build(), slice(0, 4))
    for said in both:
        for found, expected in zip(said["profile"], alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


def signals_are_those_of_one_process(folder: Path, both: list[Said]) -> None:
    for number, options in enumerate(SIGNALS):
        model, adapter = attached(**options)
        alone = measure(model, adapter, slice(0, 4))
        for said in both:
            for name in ("sharded", "parallel", "ep"):
                steps = zip(said[f"signals, {name}"][number], alone, strict=True)
                for number_of_step, (step, own) in enumerate(steps):
                    for layer, pair in own.items():
                        for found, expected in zip(step[layer], pair, strict=True):
                            np.testing.assert_allclose(
                                found, expected, rtol=1e-9, atol=1e-14, err_msg=f"{name}, {options}"
                            )
                            assert expected.any() or not number_of_step  # B starts at 0


CHECKS = (
    signals_are_those_of_one_process,
    a_profile_is_that_of_one_process,
    refused_in_all_processes,
    one_process_that_saves_alone_ends_all,
    a_refused_action_does_no_harm,
    a_dropped_batch_does_not_count,
    late_statistics_decide_the_same,
    trial_steps_do_not_count,
    gathered_copies_are_not_taken_for_parameters,
    float32_lora_beside_bfloat16,
    all_tokens_on_the_experts_of_one_process,
    several_adapters_take_turns,
    saved_beside_others,
    a_state_that_others_have_gathered_is_saved_whole,
)


@launches
def test_adapters_that_two_processes_hold_together(tmp_path: Path) -> None:
    """One launch for all: each check looks at what both processes said and saw."""
    build().save_pretrained(tmp_path / "model")
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for check in CHECKS:
        check(tmp_path, both)


def test_find_rows_of_a_plain_tensor() -> None:
    tensor: Tensor = torch.arange(6.0).view(3, 2)
    here, places = parts.find_rows(tensor, parts.held_rows(tensor)[1:])
    assert here.tolist() == [0, 1]
    assert places.tolist() == [1, 2]
    assert parts.num_parts(tensor) == 1

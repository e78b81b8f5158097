"""The tests can fail: each guard is taken away in turn, and the test that is for it must notice.

Without the change every one of these checks passes; they are run as ordinary tests elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.lifecycle import model as model_changes
from drlora_torch.lifecycle import running, trained
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA, SlotLoRA
from drlora_torch.lora.rows import RowGenerator
from drlora_torch.lora.slots import SlotTable
from drlora_torch.step import growth, newborn, samples, warmup
from drlora_torch.step import tracker as tracker_module
from drlora_torch.step.forwards import ForwardWatch, ModelCall
from drlora_torch.step.importance import slot_importance
from drlora_torch.step.optimizers import adam, codes, meanings
from drlora_torch.step.routing import Routing
from drlora_torch.step.tracker import StepTracker
from drlora_torch.step.witness import GradientWitness
from drlora_torch.storage import checkpoint
from tests.marks import slow_but
from tests.torch import (
    test_amp,
    test_checkpoint,
    test_counting,
    test_growth,
    test_life,
    test_named_adapters,
    test_named_life,
    test_optimizer_newborn,
    test_optimizer_state,
    test_parity_experts,
    test_parity_models,
    test_pending,
    test_routers,
    test_state_dict,
    test_statistics,
)

Break = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[Path], None]


def replace(owner: Any, name: str, value: Any) -> Break:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in place of a guard."""


# -- guards that forget something ----------------------------------------------------------------


def rows_return_to_other_tokens(
    top_k_index: Tensor, num_experts: int, *, sentinels: bool
) -> Dispatch:
    dispatch = sort(top_k_index, num_experts, sentinels=sentinels)
    return dataclasses.replace(dispatch, order=dispatch.order.flip(0))


def sentinels_go_to_the_last_expert(
    top_k_index: Tensor, num_experts: int, *, sentinels: bool
) -> Dispatch:
    return sort(top_k_index.clamp(max=num_experts - 1), num_experts, sentinels=sentinels)


sort = Dispatch.sort


def slots_in_the_order_of_storage(self: SlotTable) -> np.ndarray:
    return np.flatnonzero(self.owner != -1)


def rows_from_the_global_generator(self: RowGenerator, expert: int, dimension: int) -> np.ndarray:
    return torch.rand(self._width).numpy()


def read_without_scale(self: StepTracker, optimizer: Any) -> None:
    self._slots = slot_importance(layer.lora for layer in self.attached.layers.values())


def observe_zeros(attached: Attached, reason: str) -> None:
    attached.skipped_steps += 1
    for name, layer in attached.layers.items():
        size = layer.lora.table.num_experts
        attached.engine.observe(name, routing=np.zeros(size), importance=np.zeros(size))


def fill_without_ages(attached: Attached, saved: Any, events: Any) -> None:
    fill(attached, saved, events)
    for ages in attached.ages.values():
        ages[:] = -1


fill = checkpoint.fill


def build_without_dropout(
    self: ExpertLoRA, name: str, shapes: Any, table: Any, scaling: float, dropout: float, *rest: Any
) -> None:
    build(self, name, shapes, table, scaling, 0.0, *rest)


build = ExpertLoRA.__init__


def clear_only_A(self: SlotLoRA, rows: Tensor) -> None:
    with torch.no_grad():
        self.lora_A[rows] = 0.0


def born_with_B(self: SlotLoRA, rows: Tensor, *owners: Tensor) -> None:
    birth(self, rows, *owners)
    with torch.no_grad():
        self.lora_B[rows] = 0.01


birth = SlotLoRA.birth


def state_without(kind: str) -> Callable[[StepTracker], dict[str, Tensor]]:
    return lambda tracker: {k: v for k, v in whole(tracker).items() if f"/{kind}/" not in k}


whole = StepTracker.state_dict


def count_at_once(
    self: StepTracker, lora: Any, output: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As if a forward counted, whether a backward pass follows or not."""
    call = self._watch.running
    vars(self._passes)["reach"] = lambda layer: None  # only a backward pass can look forward
    self.reached(Routing(lora.name, 1, top_k_index, top_k_weights.detach(), call))
    return output


def count_each_time(output: Tensor, tracker: Any, routing: Routing) -> None:
    output.register_hook(lambda gradient: tracker().reached(routing))


def no_gradient(self: GradientWitness, anywhere: Any) -> bool:
    gradients = [p.grad for lora in self._parameters.values() for p in lora]
    return not self.seen or any(bool(g.any()) for g in gradients if g is not None)


def checkpointing_trains() -> None:
    try:
        test_parity_models.test_checkpointing_gives_the_same_gradients(True, 0.0)
    except RuntimeError as error:
        raise AssertionError("no gradient reaches the LoRA") from error


def newborn_rows_in_8_bits_stay_near() -> None:
    with torch.compiler.set_stance("force_eager"):
        test_optimizer_state.test_newborn_rows_move_as_far_as_without_quantization(
            "torchao adamw8bit", "pooled"
        )


GUARDS: dict[str, tuple[Break, Check]] = {
    "recomputation counts": (
        replace(StepTracker, "routed", count_at_once),
        lambda _: test_counting.test_gradient_checkpointing_counts_once(True, True),
    ),
    "padding counts": (
        replace(ModelCall, "token_mask", nothing),
        lambda _: test_statistics.test_padding_does_not_count("olmoe", "left"),
    ),
    "padding counts in checkpointed layers": (
        replace(ForwardWatch, "checkpointed_call", nothing),
        lambda _: test_counting.test_padding_does_not_count_in_checkpointed_layers(True),
    ),
    "evaluation counts": (
        replace(StepTracker, "routed", count_at_once),
        lambda _: test_counting.test_what_must_not_count(),
    ),
    "a graph that is gone through twice counts twice": (
        replace(tracker_module, "_call_once", count_each_time),
        lambda _: test_counting.test_a_second_backward_of_one_forward_counts_nothing(None),
    ),
    "dropped gradients count": (
        replace(GradientWitness, "alive", lambda *_: True),
        lambda _: test_counting.test_dropped_gradients_drop_their_tokens(True),
    ),
    "zero gradients are taken for dropped ones": (
        replace(GradientWitness, "alive", no_gradient),
        lambda _: test_counting.test_gradients_of_zero_are_not_dropped_ones(),
    ),
    "skipped steps count": (
        replace(GradientWitness, "alive", lambda *_: True),
        lambda _: test_amp.test_a_skipped_step_updates_nothing(False, False),
    ),
    "skipped steps count if zero_grad comes late": (
        replace(GradientWitness, "alive", lambda *_: True),
        lambda _: test_amp.test_a_skipped_step_updates_nothing(False, True),
    ),
    "fused steps are read scaled": (
        replace(StepTracker, "_read", read_without_scale),
        lambda _: test_amp.test_gradients_are_read_unscaled(True),
    ),
    "skipped fused steps count": (
        replace(StepTracker, "_read", read_without_scale),
        lambda _: test_amp.test_a_skipped_step_updates_nothing(True, False),
    ),
    "non-finite statistics enter the averages": (
        replace(samples, "_skip", observe_zeros),
        lambda _: test_amp.test_statistics_that_are_not_finite(float("nan")),
    ),
    "optimizer state of changed slots is kept": (
        replace(growth, "clear_state", nothing),
        lambda _: test_optimizer_state.test_an_event_makes_the_state_of_changed_slots_fresh(
            "adam", test_optimizer_state.PRUNE, "pooled"
        ),
    ),
    "old momentum moves free slots": (
        replace(growth, "clear_state", nothing),
        lambda _: test_optimizer_state.test_freed_slots_stay_zero("sgd momentum", "pooled"),
    ),
    "newborn rows are not corrected": (
        replace(newborn, "correct", lambda *_: 0.0),
        lambda _: test_optimizer_newborn.test_newborn_rows_move_as_if_their_count_had_just_begun(
            "adamw", "pooled"
        ),
    ),
    "newborn rows do not age": (
        replace(newborn.Young, "advance", nothing),
        lambda _: test_optimizer_newborn.test_newborn_rows_move_as_if_their_count_had_just_begun(
            "adamw", "pooled"
        ),
    ),
    "8-bit state is reset to the code 0": (
        replace(codes, "_code_of_zero", lambda _: 0),
        lambda _: test_optimizer_state.test_an_event_makes_the_state_of_changed_slots_fresh(
            "adamw8bit", test_optimizer_state.PRUNE, "pooled"
        ),
    ),
    "schedule-free copies of the weights are zeroed": (
        lambda monkeypatch: monkeypatch.setitem(
            meanings.OWN, "schedulefree.AdamWScheduleFree", {"z": meanings.zeros}
        ),
        lambda _: test_optimizer_state.test_an_event_makes_the_state_of_changed_slots_fresh(
            "schedulefree adamw", test_optimizer_state.GROW, "pooled"
        ),
    ),
    "8-bit state moves free slots": (
        replace(growth, "hold_free_slots", nothing),
        lambda _: test_optimizer_state.test_freed_slots_stay_zero("lion8bit", "pooled"),
    ),
    "steps of newborn rows in 8 bits have no limit": (
        replace(adam, "is_quantized", lambda *_: False),
        lambda _: newborn_rows_in_8_bits_stay_near(),
    ),
    "unknown state passes the first step": (
        replace(growth, "check_optimizer", nothing),
        lambda _: test_optimizer_state.test_unknown_state_is_refused_at_the_first_step(
            test_optimizer_state.Remembering
        ),
    ),
    "rows return to other tokens": (
        replace(Dispatch, "sort", staticmethod(rows_return_to_other_tokens)),
        lambda _: test_parity_experts.test_every_routing("random", "pooled"),
    ),
    "sentinels go to the last expert": (
        replace(Dispatch, "sort", staticmethod(sentinels_go_to_the_last_expert)),
        lambda _: test_parity_experts.test_every_routing("sentinels", "pooled"),
    ),
    "slots of other experts": (
        replace(SlotTable, "active", slots_in_the_order_of_storage),
        lambda _: test_parity_experts.test_every_routing("random", "pooled"),
    ),
    "rows come from the global generator": (
        replace(RowGenerator, "draw", rows_from_the_global_generator),
        lambda _: test_growth.test_random_streams_are_untouched("pooled"),
    ),
    "newborn dimensions have a B": (
        replace(SlotLoRA, "birth", born_with_B),
        lambda _: test_growth.test_event_leaves_the_function_as_it_was("pooled"),
    ),
    "freed slots keep their B": (
        replace(SlotLoRA, "clear", clear_only_A),
        lambda _: test_growth.test_free_slots_are_exactly_zero(
            "pooled", {"policy": "prune", "r_init": 6}
        ),
    ),
    "dropout is forgotten": (
        replace(ExpertLoRA, "__init__", build_without_dropout),
        lambda _: (
            test_parity_models.test_dropout_drops_and_rescales_inputs_of_the_low_rank_part_only()
        ),
    ),
    "detach leaves parameters frozen": (
        replace(model_changes, "freeze", lambda model: model.requires_grad_(False) and nothing),
        lambda _: test_life.test_detach_restores_the_model("olmoe", "pooled"),
    ),
    "checkpoints of the base hold the LoRA": (
        replace(model_changes, "keep_out_of_checkpoints", lambda *_: nothing),
        test_life.test_base_checkpoint_is_written_while_attached,
    ),
    "reentrant checkpointing trains nothing": (
        replace(model_changes, "let_checkpointing_reach_lora", lambda _: nothing),
        lambda _: checkpointing_trains(),
    ),
    "the extra state is not loaded": (
        replace(checkpoint, "commit", nothing),
        lambda path: test_state_dict.test_training_goes_on_as_it_would_have({}, path),
    ),
    "routers learn during the warmup": (
        replace(warmup, "_is_warming_up", lambda _: False),
        lambda _: test_routers.test_routers_change_only_when_they_should("olmoe", "after_warmup"),
    ),
    "optimizers of resting adapters move the routers": (
        replace(trained.TrainedGuard, "_before_step", nothing),
        lambda _: test_named_adapters.test_optimizers_of_resting_adapters_leave_the_routers_alone(),
    ),
    "routers are not exchanged": (
        replace(running, "show_trained", nothing),
        lambda _: test_named_life.test_detach_in_any_order_restores_the_model(("b", "c", "a")),
    ),
    "a switch keeps nothing of an unfinished step": (
        replace(StepTracker, "state_dict", lambda _: {}),
        lambda path: test_named_adapters.test_micro_batches_of_several_may_take_turns(True, path),
    ),
    "ages are lost on resume": (
        replace(checkpoint, "fill", fill_without_ages),
        lambda path: test_checkpoint.test_resume_at_any_step(path, 5, "pooled", {}),
    ),
    "routing of an unfinished step is lost on resume": (
        replace(StepTracker, "state_dict", state_without("routing")),
        lambda path: test_pending.test_resume_at_any_micro_batch(path, {}),
    ),
    "gradients of an unfinished step are lost on resume": (
        replace(StepTracker, "state_dict", state_without("gradient")),
        lambda path: test_pending.test_resume_at_any_micro_batch(path, {}),
    ),
    "importance of an unfinished step is lost on resume": (
        replace(StepTracker, "state_dict", state_without("importance")),
        test_pending.test_saved_before_a_step_is_closed_by_hand,
    ),
}


NOTICED = (AssertionError, pytest.fail.Exception)


@pytest.mark.filterwarnings("ignore")  # a broken guard may well warn on its way
@pytest.mark.parametrize("guard", slow_but(GUARDS, list(GUARDS)[::2]))
def test_a_missing_guard_is_noticed(
    guard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_away, check = GUARDS[guard]
    take_away(monkeypatch)
    with pytest.raises(NOTICED):
        check(tmp_path)

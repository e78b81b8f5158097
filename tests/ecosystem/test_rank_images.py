"""Pictures of the ranks, and who gets them when."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerState

from drlora_torch.integrations.rank_images import RankImages, rank_image
from tests.torch import helpers, models


def test_the_picture_has_a_row_for_each_layer() -> None:
    adapter = helpers.attach(models.build())
    helpers.uneven(adapter)
    ranks = np.stack(list(adapter.ranks().values()))
    image = rank_image(adapter)
    size = image.shape[0] // ranks.shape[0]
    assert image.shape == (ranks.shape[0] * size, ranks.shape[1] * size, 3)
    assert image.shape[1] >= 512
    cells = image[::size, ::size].astype(int)
    for first, second in ((0, 0), (1, 1), (1, 2)):
        brighter = cells[..., 1] > cells[first, second, 1]  # green rises with the rank
        assert np.array_equal(brighter, ranks > ranks[first, second])


class Board(TrainerCallback):
    """As TensorBoard's callback: its writer is made when the training begins."""

    def __init__(self) -> None:
        self.tb_writer: Any = None
        self.sent: list[tuple[str, int, Any]] = []

    def open(self) -> None:
        self.tb_writer = self

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.sent.append((tag, step, image))

    def add_histogram(self, tag: str, values: Any, step: int) -> None:
        self.sent.append((tag, step, values))


class Wandb(TrainerCallback):
    """As the callback of Weights & Biases."""

    def __init__(self) -> None:
        self._wandb, self.sent = self, list[dict[str, Any]]()

    Image = Histogram = staticmethod(np.asarray)

    def log(self, values: dict[str, Any]) -> None:
        self.sent.append(values)


def test_reporters_get_a_picture_after_each_event() -> None:
    adapter = helpers.attach(models.build())
    board, wandb = Board(), Wandb()
    images = RankImages(adapter, [TrainerCallback(), board, wandb])
    board.open()
    optimizer, state = helpers.adamw(adapter), TrainerState()
    grown = [0]
    for step in range(1, 7):
        helpers.step(adapter.model, optimizer, step)
        state.global_step = step
        images.on_step_end(None, state, None)
        grown += [step] if len(adapter.events) > len(grown) - 1 else []
    assert len(grown) > 1
    steps = [1, *(step for step in grown[1:] if step > 1)]
    assert [step for tag, step, _ in board.sent if tag == "ranks"] == steps
    assert [step for tag, step, _ in board.sent if tag == "rank"] == steps
    assert [values["train/global_step"] for values in wandb.sent] == steps
    assert np.array_equal(board.sent[-2][2], rank_image(adapter))
    assert board.sent[-1][2].sum() == sum(ranks.sum() for ranks in adapter.ranks().values())
    state.is_world_process_zero = False
    RankImages(adapter, [board, wandb]).on_step_end(None, state, None)
    assert len(wandb.sent) == len(steps)

"""Pictures of the ranks for the reporters of a Trainer.

Shape letters: L layers, N experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from drlora_torch.adapter import Adapter

# Five colors of viridis, which those who do not see all colors can tell apart.
COLORS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)
WIDTH = 512
"""Pixels that a picture has at least."""


def rank_image(adapter: Adapter) -> NDArray[np.uint8]:
    """Draw the ranks as a heatmap [height, width, 3]: a row for each layer, the first on top.

    Dark is rank 0, bright is r_max. A layer of fewer experts than others ends in white.
    """
    layers = list(adapter.ranks().values())
    experts = max(ranks.size for ranks in layers)
    image = np.full((len(layers), experts, 3), 255, dtype=np.uint8)
    stops = np.linspace(0.0, adapter.engine.config.r_max, len(COLORS))
    for row, ranks in zip(image, layers, strict=True):
        for channel in range(3):
            row[: ranks.size, channel] = np.interp(ranks, stops, COLORS[:, channel]).round()
    size = max(1, -(-WIDTH // experts))
    return image.repeat(size, axis=0).repeat(size, axis=1)


class RankImages(TrainerCallback):
    """Sends the ranks to TensorBoard and Weights & Biases, as a heatmap and a histogram.

    It does so after the first step and after each growth event. Other reporters get
    the numbers of :func:`~drlora_torch.integrations.metrics.rank_metrics` alone.

    Args:
        adapter: the adapter of the Trainer's model.
        reporters: callbacks of the Trainer; those of other kinds are left alone.

    Example::

        move_reporters_last(trainer)
        trainer.add_callback(RankImages(adapter, trainer.callback_handler.callbacks))
    """

    def __init__(self, adapter: Adapter, reporters: Iterable[TrainerCallback]) -> None:
        self._adapter = adapter
        self._reporters = list(reporters)
        self._events = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self._adapter.events) != self._events:
            self._send(state)

    def _send(self, state: Any) -> None:
        self._events = len(self._adapter.events)
        if not state.is_world_process_zero:
            return
        image = rank_image(self._adapter)
        ranks = np.concatenate(list(self._adapter.ranks().values()))
        for reporter in self._reporters:
            writer = getattr(reporter, "tb_writer", None)
            if writer is not None:
                writer.add_image("ranks", image, state.global_step, dataformats="HWC")
                writer.add_histogram("rank", ranks, state.global_step)
            wandb = getattr(reporter, "_wandb", None)
            if wandb is not None:
                wandb.log(
                    {
                        "ranks": wandb.Image(image),
                        "rank": wandb.Histogram(ranks),
                        "train/global_step": state.global_step,
                    }
                )

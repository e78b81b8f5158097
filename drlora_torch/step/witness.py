"""Tell whether gradients that had arrived were dropped without an optimizer step.

A batch that is given up after its backward pass (NaN, out of memory) leaves its routing behind;
``zero_grad`` is the sign. Gradients are then gone, or zeroed in place; zeros that a backward pass
wrote itself (a group without advantage, a masked batch) are no such sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from drlora_torch.lora import parts

ON_THE_WAY = -2  # where the backward pass has not ended yet
NONE = -1


class GradientWitness:
    """Watches the gradients of the layers that a backward pass has reached.

    It remembers the parameters as they were after that pass: between forward and backward,
    ``fully_shard`` has others in the model, and the gradients are not theirs.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._versions: dict[str, int] = {}  # of a gradient of each layer after its backward pass

    @property
    def seen(self) -> bool:
        """True if gradients of this step have arrived, or were to."""
        return bool(self._versions)

    @property
    def missed(self) -> bool:
        """True if backward passes have reached layers, and left none of their gradients."""
        return self.seen and all(version == NONE for version in self._versions.values())

    def expect(self, layer: str, lora: Iterable[nn.Parameter]) -> None:
        """Note that a backward pass has reached a layer: its gradients come next."""
        self._parameters.setdefault(layer, list(lora))
        self._versions[layer] = ON_THE_WAY

    def note(self, layer: str, lora: Iterable[nn.Parameter]) -> None:
        """Note that the gradients of a layer have arrived."""
        self._parameters[layer] = list(lora)
        self._versions[layer] = self._version_now(layer)

    def alive(self, anywhere: Callable[[Tensor], Tensor]) -> Tensor | bool:
        """False if gradients had arrived and there is nothing left of them.

        Args:
            anywhere: from what holds in this process to what holds in any of those that share rows:
                free rows have no gradient, and a process may hold nothing else.

        Returns:
            bool, or bool [] on the device of the gradients where only that can tell.
        """
        now = {layer: self._version_now(layer) for layer in self._versions}
        if now == self._versions:
            return True  # nobody has written to them since
        every = [p.grad for lora in self._parameters.values() for p in lora]
        gradients = [parts.local(gradient) for gradient in every if gradient is not None]
        if not gradients:
            return False
        device = gradients[0].device
        return anywhere(torch.stack([each.any().to(device) for each in gradients]).any())

    def accept(self) -> None:
        """Go on from the gradients as they are now."""
        self._versions = {layer: self._version_now(layer) for layer in self._versions}

    def forget(self) -> None:
        self._parameters.clear()
        self._versions.clear()

    def _version_now(self, layer: str) -> int:
        """How often its first gradient was written to in place; NONE without one.

        Of a DTensor, torch counts what is done to it, and to the part that is here, apart.
        """
        gradient = self._parameters[layer][0].grad
        return NONE if gradient is None else gradient._version + parts.local(gradient)._version

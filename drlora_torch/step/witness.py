"""Tell whether gradients that had arrived were dropped without an optimizer step.

A batch that is given up after its backward pass (NaN, out of memory) leaves its routing behind;
``zero_grad`` is the sign. Gradients are then gone, or zeroed in place; zeros that a backward pass
wrote itself (a group without advantage, a masked batch) are no such sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class GradientWitness:
    """Watches the gradient of one LoRA parameter of each layer for all of them.

    Args:
        watched: those parameters, by layer.
    """

    def __init__(self, watched: Mapping[str, nn.Parameter]) -> None:
        self._versions: dict[str, int] = {}  # of the gradients after the last backward pass
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_noting(self._versions, name))  # type: ignore[no-untyped-call]
            for name, parameter in watched.items()
        ]

    @property
    def seen(self) -> bool:
        """True if gradients of this step have arrived."""
        return bool(self._versions)

    def cleared(self, watched: Mapping[str, nn.Parameter], lora: list[nn.Parameter]) -> bool:
        """True if gradients had arrived and there is nothing left of them.

        Args:
            watched: as they are now.
            lora: all parameters whose gradients are asked for.
        """
        gradients = [p.grad for p in lora if p.grad is not None]
        if not self.seen or not gradients:
            return self.seen
        now = {name: _version_of(watched[name]) for name in self._versions}
        if now == self._versions:
            return False  # nobody has written to them since
        if any(bool(gradient.any()) for gradient in gradients):
            self._versions.update(now)
            return False
        return True

    def note(self, watched: Mapping[str, nn.Parameter]) -> None:
        """Take gradients that were set by hand for some that have arrived."""
        self._versions.update({name: _version_of(p) for name, p in watched.items()})

    def forget(self) -> None:
        self._versions.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _noting(versions: dict[str, int], name: str) -> Callable[[Tensor], None]:
    """A hook; the garbage collector does not see it, so it must not refer to a model."""

    def arrived(parameter: Tensor) -> None:
        versions[name] = _version_of(parameter)

    return arrived


def _version_of(parameter: Tensor) -> int:
    """How often the gradient was written to in place; -1 without one."""
    return -1 if parameter.grad is None else parameter.grad._version

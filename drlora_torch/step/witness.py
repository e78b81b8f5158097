"""Tell whether gradients that had arrived were dropped without an optimizer step.

A batch that is given up after its backward pass (NaN, out of memory) leaves its routing behind;
``zero_grad`` is the sign. Gradients are then gone, or zeroed in place; zeros that a backward pass
wrote itself (a group without advantage, a masked batch) are no such sign.
"""

from __future__ import annotations

from torch import Tensor, nn


class GradientWitness:
    """Watches the gradient of one LoRA parameter for all of them."""

    def __init__(self, parameter: nn.Parameter) -> None:
        # Hooks on parameters are not seen by the garbage collector: this one must not refer to
        # the parameter or to a model.
        self._version: list[int] = []  # of the gradient after the last backward pass
        version = self._version

        def arrived(parameter: Tensor) -> None:
            version[:] = [_version_of(parameter)]

        hook = parameter.register_post_accumulate_grad_hook
        self._handle = hook(arrived)  # type: ignore[no-untyped-call]

    @property
    def seen(self) -> bool:
        """True if gradients of this step have arrived."""
        return bool(self._version)

    def cleared(self, parameters: list[nn.Parameter]) -> bool:
        """True if there is nothing in the gradients of these parameters that a backward pass left.

        To be asked only after one that reached the experts, and before the next arrives. The first
        parameter is the one that is watched.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return True
        if (version := _version_of(parameters[0])) in self._version:
            return False  # nobody has written to them since
        if any(bool(gradient.any()) for gradient in gradients):
            self._version[:] = [version]
            return False
        return True

    def note(self, parameter: nn.Parameter) -> None:
        """Take a gradient that was set by hand for one that has arrived."""
        self._version[:] = [_version_of(parameter)]

    def forget(self) -> None:
        self._version.clear()

    def remove(self) -> None:
        self._handle.remove()


def _version_of(parameter: Tensor) -> int:
    """How often the gradient was written to in place; -1 without one."""
    return -1 if parameter.grad is None else parameter.grad._version

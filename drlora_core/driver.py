"""Who makes the steps of an engine: the caller's own loop, or a model that the engine decides for.

A model holds its experts at the ranks of the engine. What changes an engine from elsewhere would
leave the two at different ranks, so it is refused.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from drlora_core.errors import LayoutError, StepOrderError


class Driver:
    """The owner of an engine, if it has one; a copy of the engine has none.

    Example:
        >>> class Model: ...
        >>> driver, model = Driver(), Model()
        >>> driver.take(model, "use model.train()")
        >>> driver.check("step")
        Traceback (most recent call last):
        drlora_core.errors.StepOrderError: engine.step() was called on an engine that is driven by \
a model, whose layers would keep other ranks; use model.train()
        >>> with driver.acting():
        ...     driver.check("step")
        >>> driver.give_back()
        >>> driver.check("step")
    """

    def __init__(self) -> None:
        self._owner: weakref.ref[object] | None = None
        self._advice = ""
        self._acting = False

    def __reduce__(self) -> tuple[type[Driver], tuple[()]]:
        return Driver, ()

    @property
    def owner(self) -> object | None:
        """Who drives the engine; None for a free one, and once the owner is gone."""
        return None if self._owner is None else self._owner()

    def take(self, owner: object, advice: str) -> None:
        """Let an owner alone change the engine; only a weak reference to it is kept.

        Args:
            owner: the new owner.
            advice: ends the sentence that everyone else is told, with what to call instead.

        Raises:
            LayoutError: the engine has another owner.
        """
        if self.owner not in (None, owner):
            raise LayoutError("the engine is driven by another model; give each one of its own")
        self._owner, self._advice = weakref.ref(owner), advice

    def give_back(self) -> None:
        """Let everyone change the engine again."""
        self._owner = None

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Inside, the owner is calling."""
        before, self._acting = self._acting, True
        try:
            yield
        finally:
            self._acting = before

    def check(self, method: str) -> None:
        """Refuse a call of a method of the engine that its owner does not make.

        Raises:
            StepOrderError: the engine has an owner, and this is not inside :meth:`acting`.
        """
        if self._owner is None or self._acting or self._owner() is None:
            return
        raise StepOrderError(
            f"engine.{method}() was called on an engine that is driven by a model, whose layers "
            f"would keep other ranks; {self._advice}"
        )

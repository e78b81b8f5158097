"""Extension of Griffe: what our docstrings write as Sphinx has it, as its Google style has it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`[~.]*([^`]+)`")
EXAMPLE = re.compile(r"^Example:(?=\n\s+>>>)", re.MULTILINE)


class Roles(Extension):
    """Show ``:func:`attach``` as `attach`, and doctests below ``Example:`` as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)

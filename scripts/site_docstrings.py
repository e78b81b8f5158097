"""Extension of Griffe: what our docstrings write as Sphinx has it, as its Google style has it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`[~.]*([^`]+)`")
EXAMPLE = re.compile(r"^Example:(?=\n\s+>>>)", re.MULTILINE)


class Roles(Extension):
    """Show ``:func:`attach``` as `attach`, and doctests below ``Example:`` as code."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite the docstrings of a package and of all that is in it."""
        rewrite(pkg)


def rewrite(found: Object) -> None:
    """Rewrite the docstring of a module, class, function or attribute, and of its members."""
    if found.docstring is not None:
        text = ROLE.sub(r"`\1`", found.docstring.value)
        found.docstring.value = EXAMPLE.sub("Examples:", text)
    for member in found.members.values():
        if not member.is_alias:
            rewrite(member)

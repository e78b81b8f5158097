"""Methods that differ from DR-LoRA in a single option, and tables of the effect of the option."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from benchmarks.quality.allocation import allocator_config, training_of
from benchmarks.quality.cells import Rows, better_or_worse, interval
from benchmarks.quality.claims import CLAIMED, DRLORA, Comparison, compare
from benchmarks.quality.records import Method, Training
from benchmarks.quality.runs import Results, Setting
from benchmarks.quality.why import ONLY_HERE

COMPONENTS = {"use_routing", "use_importance", "policy", "scope"}
"""Options whose change makes another method."""


def overrides(method: Method) -> dict[str, Any]:
    """All options of a method that differ from those of its study."""
    return {**method.config, **method.attach, **method.training}


def factor(method: Method, reference: Method) -> tuple[str, Any] | None:
    """The single option in which a method differs from the reference, and its value, or None.

    Several options that changed together count as one, unless one of ``COMPONENTS`` is among them.

    Example:
        >>> drlora = Method(name="drlora")
        >>> factor(Method(name="gamma_0", config={"gamma": 0.0}), drlora)
        ('gamma', 0.0)
        >>> both = {"importance_decay": 0.5, "routing_decay": 0.5}
        >>> factor(Method(name="decays", config=both), drlora)
        ('importance_decay + routing_decay', (0.5, 0.5))
        >>> factor(Method(name="mine", policy="mine"), drlora)
    """
    if method.upper_bound or (method.kind, method.policy) != (reference.kind, reference.policy):
        return None
    ours, theirs = overrides(method), overrides(reference)
    different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if not different or any(key not in ours for key in different):
        return None
    if len(different) == 1:
        return different[0], ours[different[0]]
    if COMPONENTS & set(different):
        return None
    return " + ".join(different), tuple(ours[key] for key in different)


def factors(results: Results, reference: str = DRLORA) -> dict[str, dict[str, Any]]:
    """Option to {method: value}, for all methods that ran and differ in that option alone."""
    found: dict[str, dict[str, Any]] = {}
    for cells in results.cells.values():
        if reference not in cells:
            continue
        for name, cell in cells.items():
            single = factor(cell.method, cells[reference].method)
            if single is not None:
                found.setdefault(single[0], {})[name] = single[1]
    return {option: dict(sorted(found[option].items(), key=_by_value)) for option in sorted(found)}


def _by_value(item: tuple[str, Any]) -> tuple[bool, float, str]:
    name, value = item
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not number, float(value) if number else 0.0, name


def reference_value(option: str, variant: str, results: Results) -> str:
    """Value of an option in DR-LoRA itself, in the settings in which a variant ran."""
    found = []
    for setting, cells in results.cells.items():
        if DRLORA in cells and variant in cells:
            pair = cells[variant].method, cells[DRLORA].method
            values = (_value(key, *pair, setting.training) for key in option.split(" + "))
            found.append(shown(tuple(values)))
    return " or ".join(dict.fromkeys(found))


def shown(value: Any) -> str:
    """A value, or the values of options that changed together."""
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(option: str, variant: Method, reference: Method, shared: Training) -> Any:
    """Value of the reference, in the units of the variant."""
    training = training_of(reference, shared)
    if option in variant.training:
        return training.model_dump(mode="json")[option]
    if option in variant.config:
        return getattr(allocator_config(reference, training, seed=0), option)
    import drlora_torch

    default = inspect.signature(drlora_torch.attach).parameters[option].default
    return reference.attach.get(option, default)


def against_reference(results: Results, method: str) -> Comparison:
    """Compare a variant with DR-LoRA itself, in all settings that have both."""
    return compare(results, method, DRLORA, settings=results.settings())


def main_methods(results: Results, settings: Iterable[Setting]) -> list[str]:
    """Methods without those that have a page of their own: variants of a single option, and tests
    of why growing helps.

    Methods of a claim are always included.
    """
    varied = factors(results).items()
    options = {name for option, by in varied if option not in COMPONENTS for name in by}
    elsewhere = (options | ONLY_HERE) - CLAIMED
    return [name for name in results.methods(settings) if name not in elsewhere]


def sensitivity(results: Results) -> Rows:
    """Effect of every option that was varied alone on the test loss of DR-LoRA."""
    rows = []
    for option, by in factors(results).items():
        if option in COMPONENTS:
            continue
        for name, value in by.items():
            found = against_reference(results, name)
            if found.groups:
                rows.append(
                    {
                        "Option": option,
                        "Default": reference_value(option, name, results),
                        "Variant": shown(value),
                        "Effect on test loss": interval(found.here),
                        "Settings": str(len(found.groups)),
                        "Runs better": f"{found.wins}/{found.here.count}",
                        "Verdict": better_or_worse(found.here),
                    }
                )
    return rows

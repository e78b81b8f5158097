"""The methods that differ from DR-LoRA in an option only, and the tables of what it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from benchmarks.quality.allocation import allocator_config, training_of
from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import CLAIMED, DRLORA, Comparison, compare
from benchmarks.quality.records import Method, Training
from benchmarks.quality.runs import Results, Setting
from drlora_core import AllocatorConfig

COMPONENTS = {"use_routing", "use_importance", "policy", "scope"}
"""Options that make another method rather than the same one with another setting."""
WRITTEN_AS = {"warmup_steps": "warmup", "growth_interval": "events"}
"""Fields of AllocatorConfig that a study gives in another unit (a share, a number of events)."""
NOT_STUDIED = {"r_target", "seed"}
"""The budget and the seed."""


def overrides(method: Method) -> dict[str, Any]:
    """All options in which a method differs from its study."""
    return {**method.config, **method.attach, **method.training}


def factor(method: Method, reference: Method) -> tuple[str, Any] | None:
    """The option, and its value, in which a method differs from the reference; None: in more.

    Several options that were changed together count as one, but not with one of ``COMPONENTS``.

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
    """Option to {method name: value}, for all methods that ran and differ in that option alone."""
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
    """What DR-LoRA itself has for an option, in the settings in which a variant of it ran."""
    found = []
    for setting, cells in results.cells.items():
        if DRLORA in cells and variant in cells:
            pair = cells[variant].method, cells[DRLORA].method
            values = (_value(key, *pair, setting.training) for key in option.split(" + "))
            found.append(shown(tuple(values)))
    return " or ".join(dict.fromkeys(found))


def shown(value: Any) -> str:
    """A value, or the values of options that were changed together."""
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(option: str, variant: Method, reference: Method, shared: Training) -> Any:
    """The reference's value, in the unit in which the variant writes its own."""
    training = training_of(reference, shared)
    if option in variant.training:
        return training.model_dump(mode="json")[option]
    if option in variant.config:
        return getattr(allocator_config(reference, training, seed=0), option)
    import drlora_torch

    default = inspect.signature(drlora_torch.attach).parameters[option].default
    return reference.attach.get(option, default)


def against_reference(results: Results, method: str) -> Comparison:
    """A variant against DR-LoRA itself, wherever both ran."""
    return compare(results, method, DRLORA, settings=results.settings())


def main_methods(results: Results, settings: Iterable[Setting]) -> list[str]:
    """The methods that are not DR-LoRA with one option changed; those have a table of their own.

    A method that a claim is about is among them in any case.
    """
    varied = factors(results).items()
    options = {name for option, by in varied if option not in COMPONENTS for name in by}
    return [name for name in results.methods(settings) if name not in options - CLAIMED]


def sensitivity(results: Results) -> Rows:
    """Every option that was varied alone: its effect on DR-LoRA's test loss."""
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
                        "DR-LoRA has": reference_value(option, name, results),
                        "Instead": shown(value),
                        "Effect on test loss": interval(found.here),
                        "Settings": str(len(found.groups)),
                        "Runs better": f"{found.wins}/{found.here.count}",
                        "So": _so(found),
                    }
                )
    return rows


def _so(found: Comparison) -> str:
    return {-1: "better", 1: "worse", 0: "undecided"}[found.here.side]


def defaults(results: Results) -> Rows:
    """Every field of AllocatorConfig with its default and what the runs say about others."""
    fields = AllocatorConfig.model_fields.keys() | set(WRITTEN_AS.values())
    varied = {key: by for key, by in factors(results).items() if set(key.split(" + ")) <= fields}
    rows = []
    for name, field in AllocatorConfig.model_fields.items():
        if name in NOT_STUDIED:
            continue
        names = {name, WRITTEN_AS.get(name)}
        tried = {key: by for key, by in varied.items() if names & set(key.split(" + "))}
        rows.append(
            {
                "Field": f"`{name}`",
                "Default": str(field.default),
                "Evidence": _sentence(results, tried) or "not varied",
            }
        )
    return rows


def _sentence(results: Results, tried: dict[str, dict[str, Any]]) -> str:
    parts = []
    for key, by in tried.items():
        for name, value in by.items():
            found = against_reference(results, name)
            if found.groups:
                has = reference_value(key, name, results)
                effect = f"{interval(found.here)}, {_so(found)}"
                parts.append(f"{key} {shown(value)} for {has}: {effect}")
    return "; ".join(parts)

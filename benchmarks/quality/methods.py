"""The methods of the studies by name; variants of one parameter are written in the study files."""

from __future__ import annotations

from benchmarks.quality.study import Method

# One unit at a time spreads a quota by itself, and proportional shares do: no cap but r_max.
_RESCORED = {"policy": "rescored", "max_growth": None}
_NO_PREFERENCE = {"use_routing": False, "use_importance": False}
_EARLY = {"warmup": 0.05, "growth_end": 0.25}
_BY_PROFILE = {"policy": "proportional", "use_importance": False, "gamma": 0.0}

_BASELINES = (
    Method(name="uniform", config={"policy": "uniform"}),
    Method(name="uniform_peft", kind="peft_lora", config={"policy": "uniform"}),
    Method(name="peft_adalora", kind="peft_adalora", config={"policy": "uniform"}),
    Method(name="static_profile", kind="static_profile", config=_BY_PROFILE),
    Method(name="r_max_everywhere", config={"policy": "uniform"}, upper_bound=True),
)
_PAPER = (
    Method(name="drlora"),
    Method(name="without_f", config={"use_routing": False}),
    Method(name="without_g", config={"use_importance": False}),
    Method(name="random", config={"policy": "random"}),
    # The same timetable with no preference: growing late without choosing where.
    Method(name="uniform_growth", config={**_RESCORED, **_NO_PREFERENCE}),
    Method(name="prune", config={"policy": "prune"}),
)
_VARIANTS = (
    Method(name="rescored", config=_RESCORED),
    Method(name="proportional", config={"policy": "proportional", "max_growth": None}),
    Method(name="global", config={"scope": "global"}),
    Method(name="newborn_plain", attach={"newborn": "plain"}),
    Method(name="rslora", attach={"rslora": True}),
    Method(name="router_after_warmup", attach={"router": "after_warmup"}),
    Method(name="router_trainable", attach={"router": "trainable"}),
    Method(
        name="uniform_router_trainable",
        config={"policy": "uniform"},
        attach={"router": "trainable"},
    ),
)
_CANDIDATES = (
    # Growing late costs much of what growing where it counts brings: grow at once, or before.
    Method(name="early", training=_EARLY),
    Method(name="early_random", config={"policy": "random"}, training=_EARLY),
    Method(name="early_uniform_growth", config={**_RESCORED, **_NO_PREFERENCE}, training=_EARLY),
    Method(name="earliest", training={"warmup": 0.02, "growth_end": 0.1}),
    Method(name="early_prune", config={"policy": "prune"}, training=_EARLY),
    Method(name="early_rescored", config=_RESCORED, training=_EARLY),
    Method(name="early_without_f", config={"use_routing": False}, training=_EARLY),
    Method(name="early_without_g", config={"use_importance": False}, training=_EARLY),
    # All rank at one event, after 5 % of the steps: a measurement, then static LoRA.
    Method(
        name="one_event",
        config=_RESCORED,
        training={"warmup": 0.0, "growth_end": 0.05, "events": 1},
    ),
    Method(
        name="static_gradient",
        kind="static_gradient",
        config={**_RESCORED, "use_routing": False},
    ),
    Method(
        name="static_rescored",
        kind="static_profile",
        config={**_RESCORED, "use_importance": False},
    ),
    # Is it the ranks, or growing them? Static LoRA with the ranks that ``early`` ends with.
    Method(name="hindsight", kind="hindsight", config={"use_routing": False}),
    Method(name="per_token", policy="per_token"),
    Method(name="sqrt_f", policy="sqrt_f"),
    Method(name="total_importance", policy="total_importance"),
    # One unit at a time by S / (r + 1): final ranks, not growth, in proportion to the signal.
    Method(name="rescored_without_f", config={**_RESCORED, "use_routing": False}),
    Method(name="rescored_without_g", config={**_RESCORED, "use_importance": False}),
    Method(name="rescored_per_token", policy="rescored_per_token", config={"max_growth": None}),
    Method(name="rescored_sqrt_f", policy="rescored_sqrt_f", config={"max_growth": None}),
)

METHODS: dict[str, Method] = {
    method.name: method for method in (*_BASELINES, *_PAPER, *_VARIANTS, *_CANDIDATES)
}
"""By name, for the ``methods`` of a study file."""

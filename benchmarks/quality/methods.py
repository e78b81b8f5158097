"""The methods of the studies, by name; variants of a single option stand in the study files."""

from __future__ import annotations

from benchmarks.quality.errors import StudyError
from benchmarks.quality.records import Method
from drlora_core.errors import near_misses

# These two policies spread a quota without max_growth.
_RESCORED = {"policy": "rescored", "max_growth": None}
_NO_PREFERENCE = {"use_routing": False, "use_importance": False}
_EARLY = {"warmup": 0.05, "growth_end": 0.25}
_GIVEN = {"policy": "uniform"}
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
    # The same timetable without any preference among the experts.
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
    # Earlier growth: the final ranks are trained for longer.
    Method(name="early", training=_EARLY),
    Method(name="early_random", config={"policy": "random"}, training=_EARLY),
    Method(name="early_uniform_growth", config={**_RESCORED, **_NO_PREFERENCE}, training=_EARLY),
    Method(name="earliest", training={"warmup": 0.02, "growth_end": 0.1}),
    Method(name="early_prune", config={"policy": "prune"}, training=_EARLY),
    Method(name="early_rescored", config=_RESCORED, training=_EARLY),
    Method(name="early_without_f", config={"use_routing": False}, training=_EARLY),
    Method(name="early_without_g", config={"use_importance": False}, training=_EARLY),
    # From no LoRA at all; some experts never get any.
    Method(name="early_zero", config={"r_init": 0}, training=_EARLY),
    # Dimensions that train together from the start end up parallel, so start with one each, and
    # add one at a time. Both differ from ``early`` only where r_init is above 1.
    Method(name="sprout", config={"r_init": 1}, training=_EARLY),
    Method(
        name="staggered", config={"r_init": 1, "max_growth": 1}, training={**_EARLY, "events": 24}
    ),
    # What tells the importance of experts without rank: their gradients, or nothing but f.
    Method(name="early_zero_probed", kind="probed", config={"r_init": 0}, training=_EARLY),
    Method(
        name="early_zero_without_g",
        config={"r_init": 0, "use_importance": False},
        training=_EARLY,
    ),
    # ElaLoRA (arXiv 2504.00254): rank moves, at the full budget or while growing to it.
    Method(name="move", config={"policy": "move", "r_init": 2, "move_share": 0.5}, training=_EARLY),
    Method(name="early_move", config={"policy": "move"}, training=_EARLY),
    # Other signals.
    Method(name="early_fisher", attach={"importance": "fisher"}, training=_EARLY),
    Method(name="early_per_token", attach={"importance": "sensitivity_per_token"}, training=_EARLY),
    Method(name="early_update_norm", attach={"importance": "update_norm"}, training=_EARLY),
    Method(name="early_margin", attach={"routing": "margin"}, training=_EARLY),
    # MoE-Sieve (arXiv 2603.24044): static LoRA on the most routed experts, here at equal budget.
    Method(name="sieve", kind="from_profile", config=_GIVEN, policy="sieve"),
    # HELLoRA (arXiv 2605.18795): about 15 % of the experts; in these models, rank 8 for 2 of 16.
    Method(
        name="hellora", kind="from_profile", config={**_GIVEN, "r_max": 8}, policy="hottest_eighth"
    ),
    # A single event after 5 % of the steps: measure first, then train static LoRA.
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
    # Static LoRA with the final ranks of ``early``: is it the ranks, or growing them?
    Method(name="hindsight", kind="hindsight", config={"use_routing": False}),
    Method(name="per_token", policy="per_token"),
    Method(name="sqrt_f", policy="sqrt_f"),
    Method(name="total_importance", policy="total_importance"),
    # One unit at a time by S / (r + 1): final ranks become proportional to the signal.
    Method(name="rescored_without_f", config={**_RESCORED, "use_routing": False}),
    Method(name="rescored_without_g", config={**_RESCORED, "use_importance": False}),
    Method(name="rescored_per_token", policy="rescored_per_token", config={"max_growth": None}),
    Method(name="rescored_sqrt_f", policy="rescored_sqrt_f", config={"max_growth": None}),
)

METHODS: dict[str, Method] = {
    method.name: method for method in (*_BASELINES, *_PAPER, *_VARIANTS, *_CANDIDATES)
}
"""Used by the ``methods`` of a study file."""


def find_method(name: str) -> Method:
    """A method of ``METHODS``.

    Raises:
        StudyError: there is no method of that name.
    """
    if name not in METHODS:
        raise StudyError(f"no method {name!r}; {near_misses(name, METHODS)}")
    return METHODS[name]

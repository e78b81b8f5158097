"""What it means that a check found no problem, by the name of the check."""

from __future__ import annotations

from collections.abc import Mapping

HEALTHY: Mapping[str, str] = {
    "saturated_growth": "Growth is spread: no few experts took it all and ran into r_max.",
    "even_growth": "Ranks differ clearly from those of uniform LoRA.",
    "stagnant_growth": "Growth did not come to a stop early.",
    "unplaced_quota": "Every event placed its share.",
    "monopolised_budget": "No layer took far more than its share of the budget.",
    "unreliable_first_event": "Importance had settled before the first event.",
    "never_routed": "The router used every expert.",
    "lost_traffic": "The experts that got rank are still in use.",
    "uninformative_routing": "Routing tells the experts apart.",
    "uninformative_importance": "Importance tells the experts apart.",
    "unrelated_signals": "Routing and importance are related.",
}

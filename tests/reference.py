"""A slow, obvious engine: the method of docs/algorithm.md in plain loops over plain numbers.

It shares no code with drlora_core and takes its options as a plain dict, so that an error has to be
made twice to go unnoticed. Only exact allocations are done in fractions; everything else follows
the equations in the order in which they are written, one number at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

Options = dict[str, Any]


class Event:
    """What one event decided, by layer name."""

    def __init__(self, step: int, saliency: dict[str, list[float]]) -> None:
        self.step = step
        self.saliency = saliency
        self.deltas: dict[str, list[int]] = {}
        self.cut: dict[str, set[tuple[int, int]]] = {}
        self.unplaced = 0
        self.undecided = False  # rounding may decide otherwise: scores differ by a few ulp only


class Layer:
    """Ranks and moving averages of one layer, expert by expert."""

    def __init__(self, options: Options, num_experts: int) -> None:
        start = options["r_target"] if options["policy"] == "uniform" else options["r_init"]
        self.options = options
        self.ranks = [start] * num_experts
        self.f = [0.0] * num_experts
        self.n = 0
        self.g = [0.0] * num_experts
        self.n_i = [0] * num_experts
        self.s = [[0.0] * options["r_max"] for _ in range(num_experts)]
        self.observed = False

    def observe(self, routing: Sequence[float] | None, importance: Sequence[Any] | None) -> None:
        if routing is not None:
            beta = self.options["routing_decay"]
            for i, phi in enumerate(routing):
                self.f[i] = beta * self.f[i] + (1 - beta) * phi
            self.n += 1
        if importance is not None:
            beta = self.options["importance_decay"]
            for i, value in enumerate(importance):
                if self.ranks[i] == 0:
                    continue  # nothing to measure
                active = value[: self.ranks[i]] if isinstance(value, list) else [value]
                if isinstance(value, list):
                    for j, s_j in enumerate(active):
                        self.s[i][j] = beta * self.s[i][j] + (1 - beta) * s_j
                self.g[i] = beta * self.g[i] + (1 - beta) * sum(active) / max(len(active), 1)
                self.n_i[i] += 1
        self.observed = True

    def routing_frequency(self) -> list[float]:
        beta = self.options["routing_decay"]
        return [f / (1 - beta**self.n) if self.n else 0.0 for f in self.f]

    def rank_importance(self) -> list[float]:
        """Of experts of rank 0: what one unit of f is worth in this layer, times f."""
        beta = self.options["importance_decay"]
        measured = [g / (1 - beta**n) if n else 0.0 for g, n in zip(self.g, self.n_i, strict=True)]
        f = self.routing_frequency() if self.options["use_routing"] else [1.0] * len(measured)
        known = [i for i in range(len(f)) if self.n_i[i] > 0]
        total, visits = sum(measured[i] for i in known), sum(f[i] for i in known)
        unit = total / visits if total > 0 and visits > 0 else 1.0
        return [unit * f[i] if rank == 0 else measured[i] for i, rank in enumerate(self.ranks)]

    def dimension_importance(self) -> list[list[float]]:
        beta = self.options["importance_decay"]
        return [
            [s / (1 - beta**n) if n else 0.0 for s in row]
            for row, n in zip(self.s, self.n_i, strict=True)
        ]

    def saliency(self, ranks: Sequence[int] | None = None) -> list[float]:
        ranks = self.ranks if ranks is None else ranks
        size = len(self.ranks)
        f = self.routing_frequency() if self.options["use_routing"] else [1.0] * size
        g = self.rank_importance() if self.options["use_importance"] else [1.0] * size
        gamma = self.options["gamma"]
        return [f[i] * g[i] / (ranks[i] + 1) ** gamma for i in range(size)]

    def limits(self) -> list[int]:
        most = self.options["max_growth"]
        room = [self.options["r_max"] - r for r in self.ranks]
        return room if most is None else [min(most, left) for left in room]

    def grow(self, deltas: Sequence[int]) -> None:
        for i, delta in enumerate(deltas):
            self.ranks[i] += delta
            if delta > 0:
                self.forget(i)

    def forget(self, i: int) -> None:
        self.g[i] = 0.0
        self.n_i[i] = 0
        self.s[i] = [0.0] * self.options["r_max"]

    def cut(self, removed: set[tuple[int, int]]) -> list[int]:
        deltas = []
        for i, row in enumerate(self.s):
            kept = [row[j] for j in range(self.ranks[i]) if (i, j) not in removed]
            deltas.append(len(kept) - self.ranks[i])
            self.s[i] = kept + [0.0] * (self.options["r_max"] - len(kept))
            self.ranks[i] = len(kept)
            if deltas[-1] and not kept:
                self.forget(i)
        return deltas


class Engine:
    """The stateful reference: scope ``layer``, every policy but ``random``."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.layers: dict[str, Layer] = {}
        self.carry: dict[str, int] = {}
        self.t = 0

    def add_layer(self, name: str, num_experts: int) -> None:
        self.layers[name] = Layer(self.options, num_experts)
        self.carry[name] = 0

    def growth_steps(self) -> list[int]:
        o = self.options
        steps = []
        for t in range(1, o["growth_end"] + 1):
            if t > o["warmup_steps"] and (t - o["warmup_steps"]) % o["growth_interval"] == 0:
                steps.append(t)
        return steps

    def step(self) -> Event | None:
        assert all(layer.observed for layer in self.layers.values())
        self.t += 1
        for layer in self.layers.values():
            layer.observed = False
        t_grow = self.growth_steps()
        if self.t not in t_grow:
            return None
        event = Event(self.t, {name: layer.saliency() for name, layer in self.layers.items()})
        for name in self.layers:
            self._decide(name, t_grow.index(self.t) + 1, len(t_grow), event)
        return event

    def _decide(self, name: str, k: int, num_events: int, event: Event) -> None:
        layer = self.layers[name]
        waits = layer.n == 0 and not any(layer.n_i)  # no sample has been seen
        if self.options["policy"] == "prune":
            k = 0 if waits else k
            size = len(layer.ranks)
            start, target = size * self.options["r_init"], size * self.options["r_target"]
            scores = layer.dimension_importance()
            event.undecided |= near_tie([s for row in scores for s in row])
            count = sum(layer.ranks) - cubic_total(k, num_events, start, target)
            spare = [max(r - self.options["r_min"], 0) for r in layer.ranks]
            event.cut[name] = prune(scores, layer.ranks, count, spare)
            event.deltas[name] = layer.cut(event.cut[name])
            return
        quota = self._quota(name, k, num_events)
        size = len(layer.ranks)
        if self.options["policy"] == "move":
            growth, event.cut[name] = [0] * size, set()
            if not waits:
                event.undecided |= hangs_on_rounding(layer)
                growth, event.cut[name] = move(layer, quota, k, num_events)
            cuts = layer.cut(event.cut[name])
            layer.grow(growth)
            deltas = [more + less for more, less in zip(growth, cuts, strict=True)]
        else:
            deltas, undecided = ([0] * size, False) if waits else self._allocate(layer, quota)
            event.undecided |= undecided
            layer.grow(deltas)
        event.deltas[name] = deltas
        self.carry[name] = quota - sum(deltas)
        event.unplaced += self.carry[name]

    def _quota(self, name: str, k: int, num_events: int) -> int:
        o, layer = self.options, self.layers[name]
        size = len(layer.ranks)
        if o["quota"] is not None:
            fresh = int(o["quota"])
        else:
            budget = size * (o["r_target"] - o["r_init"])
            fresh = math.floor(Fraction(k * budget, num_events))
            fresh -= math.floor(Fraction((k - 1) * budget, num_events))
        return min(fresh + self.carry[name], size * int(o["r_target"]) - sum(layer.ranks))

    def _allocate(self, layer: Layer, quota: int) -> tuple[list[int], bool]:
        policy, ranks, limits = self.options["policy"], layer.ranks, layer.limits()
        if policy == "uniform":
            return [0] * len(ranks), False
        if policy == "greedy":
            scores = layer.saliency()
            return greedy(scores, ranks, limits, quota), near_tie(scores)
        if policy == "rescored":
            seen: list[float] = []
            for extra in range(max(limits) + 1):
                seen += layer.saliency([r + extra for r in ranks])
            return rescored(layer.saliency, ranks, limits, quota), near_tie(seen)
        return proportional(layer.saliency(), ranks, limits, quota)


def near_tie(scores: Sequence[float]) -> bool:
    """Whether two scores differ, but by no more than rounding can explain."""
    ordered = sorted(scores)
    return any(0 < b - a <= 1e-12 * b for a, b in itertools.pairwise(ordered))


def greedy(
    scores: Sequence[float], ranks: Sequence[int], limits: Sequence[int], quota: int
) -> list[int]:
    """Walk the order once: S descending, then smaller rank, then smaller index."""
    growth = [0] * len(ranks)
    for i in sorted(range(len(ranks)), key=lambda i: (-scores[i], ranks[i], i)):
        growth[i] = min(limits[i], quota)
        quota -= growth[i]
    return growth


def rescored(
    saliency_at: Callable[[Sequence[int]], Sequence[float]],
    ranks: Sequence[int],
    limits: Sequence[int],
    quota: int,
) -> list[int]:
    """Unit by unit, each to the expert that is best at the ranks reached so far."""
    growth = [0] * len(ranks)
    for _ in range(quota):
        now = [r + d for r, d in zip(ranks, growth, strict=True)]
        scores = saliency_at(now)
        open_ = [i for i in range(len(ranks)) if growth[i] < limits[i]]
        if not open_:
            break
        growth[min(open_, key=lambda i: (-scores[i], now[i], i))] += 1
    return growth


def proportional(
    scores: Sequence[float], ranks: Sequence[int], limits: Sequence[int], quota: int
) -> tuple[list[int], bool]:
    """Largest remainder of S in exact fractions; whoever is full leaves, the rest is reshared.

    The second result tells whether two different remainders are too close for floats to order.
    """
    growth = [0] * len(ranks)
    left = min(quota, sum(limits))
    open_ = [i for i in range(len(ranks)) if limits[i] > 0]
    while True:
        total = sum(Fraction(scores[i]) for i in open_)
        weight = {
            i: Fraction(scores[i]) / total if total else Fraction(1, len(open_)) for i in open_
        }
        share = {i: left * weight[i] for i in open_}
        full = [i for i in open_ if share[i] >= limits[i]]
        if not full:
            break
        for i in full:
            growth[i] = limits[i]
            left -= limits[i]
            open_.remove(i)
    rest = {i: share[i] - math.floor(share[i]) for i in open_}
    for i in open_:
        growth[i] = math.floor(share[i])
        left -= growth[i]
    order = sorted(open_, key=lambda i: (-rest[i], ranks[i], i))
    for i in order[:left]:
        growth[i] += 1
    undecided = any(
        0 < rest[winner] - rest[loser] < Fraction(1, 10**8)
        for winner in order[:left]
        for loser in order[left:]
    )
    return growth, undecided


def cubic_total(k: int, num_events: int, start: int, target: int) -> int:
    """AdaLoRA's schedule: target + (start - target) (1 - k / K)^3, rounded down."""
    return target + math.floor((start - target) * (1 - Fraction(k, num_events)) ** 3)


def prune(
    scores: Sequence[Sequence[float]], ranks: Sequence[int], count: int, spare: Sequence[int]
) -> set[tuple[int, int]]:
    """One dimension at a time, the least important of the experts that can spare one more.

    On ties: of the expert that was larger before the event, then the later dimension, then the
    later expert.
    """
    left = list(spare)
    candidates = [(i, j) for i, r in enumerate(ranks) for j in range(r)]
    removed: set[tuple[int, int]] = set()
    for _ in range(count):
        worst = min(
            (ij for ij in candidates if left[ij[0]]),
            key=lambda ij: (scores[ij[0]][ij[1]], -ranks[ij[0]], -ij[1], -ij[0]),
        )
        candidates.remove(worst)
        left[worst[0]] -= 1
        removed.add(worst)
    return removed


def move(
    layer: Layer, quota: int, k: int, num_events: int
) -> tuple[list[int], set[tuple[int, int]]]:
    """What an event moves, on the way to what it would move without its own limits."""
    o, ranks = layer.options, layer.ranks
    everybody = list(range(len(ranks)))
    goal, _ = most_moved(layer, [o["r_max"] - r for r in ranks], quota, everybody, sum(ranks))
    new = rescored(layer.saliency, ranks, layer.limits(), quota)
    limits = [max(min(a, b), c) for a, b, c in zip(layer.limits(), goal, new, strict=True)]
    old_enough = 1 if k == 1 else o["growth_interval"] + 1
    givers = [i for i in everybody if layer.n_i[i] >= old_enough and not goal[i]]
    share = Fraction(str(o["move_share"])) * (num_events - k + 1) / num_events
    growth, spare = most_moved(layer, limits, quota, givers, math.floor(share * sum(ranks)))
    moved = sum(growth) - sum(new)
    return growth, prune(layer.dimension_importance(), ranks, moved, spare)


def most_moved(
    layer: Layer, limits: Sequence[int], quota: int, givers: Sequence[int], most: int
) -> tuple[list[int], list[int]]:
    """Of all numbers of units that could move, from the largest down, the first that can."""
    room = max(sum(limits) - quota, 0)
    held = sum(max(layer.ranks[i] - layer.options["r_min"], 0) for i in givers)
    for moved in range(min(most, room, held), -1, -1):
        growth = rescored(layer.saliency, layer.ranks, limits, quota + moved)
        spare = spare_units(layer, growth, givers)
        if sum(spare) >= moved:
            return growth, spare
    raise AssertionError("no unit at all can always move")


def spare_units(layer: Layer, growth: Sequence[int], givers: Sequence[int]) -> list[int]:
    """How many units each expert can give, one after the other, while others get ``growth``."""
    spare = [0] * len(growth)
    if not any(growth):
        return spare
    received = layer.saliency([r + max(d - 1, 0) for r, d in zip(layer.ranks, growth, strict=True)])
    last_worth = min(worth for worth, d in zip(received, growth, strict=True) if d)
    for i in givers:
        if growth[i]:
            continue
        while layer.ranks[i] - spare[i] > layer.options["r_min"]:
            given = layer.saliency([max(r - spare[i] - 1, 0) for r in layer.ranks])[i]
            if 1.5 * given >= last_worth:
                break
            spare[i] += 1
    return spare


def hangs_on_rounding(layer: Layer) -> bool:
    """Whether two numbers that an exchange compares are too close to order them."""
    gained, given = [], []
    for rank in range(layer.options["r_max"]):
        for own, worth in zip(layer.ranks, layer.saliency([rank] * len(layer.ranks)), strict=True):
            if rank >= own:
                gained.append(worth)
            elif rank >= layer.options["r_min"]:
                given.append(1.5 * worth)
    close = any(0 < abs(a - b) <= 1e-12 * b for a in gained for b in given)
    scores = [s for row in layer.dimension_importance() for s in row]
    return close or near_tie(gained) or near_tie(scores)

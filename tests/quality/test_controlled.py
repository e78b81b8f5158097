"""The controlled model: the assignment is a partition, routing follows it, relevance is right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks.quality import controlled
from benchmarks.quality.models import SHIPPED, load_model
from benchmarks.quality.profiling import routing_profile
from benchmarks.quality.routing import distance, entropy
from benchmarks.quality.rows import encode
from benchmarks.quality.tasks import CONTROLLED, load_task
from benchmarks.quality.tasks.controlled import (
    DEMANDS,
    LETTERS,
    OPERATIONS,
    draw_row,
    known_tables,
    new_tables,
)


def test_every_expert_serves_exactly_one_operation() -> None:
    for experts in controlled.assignment().values():
        assert sorted(e for owned in experts.values() for e in owned) == list(range(16))
    first, *others = controlled.assignment().values()
    assert all(first != other for other in others)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_routing_of_new_tables_follows_the_assignment(operation: str) -> None:
    model, tokenizer = load_model("controlled")
    rng = np.random.default_rng(5)
    tables = new_tables(DEMANDS["controlled_share"])
    rows = [draw_row(tables, operation, length, rng) for length in (3, 5)]
    found = routing_profile(model, encode(tokenizer, rows, 64), 2, tokenizer.pad_token_id)
    assert list(found) == list(controlled.assignment())
    for layer, phi in found.items():
        owned = controlled.assignment()[layer][operation]
        assert phi.sum() == pytest.approx(1, abs=1e-5)
        assert phi[owned].sum() > 0.95
        assert phi[owned].min() > 0.3


def test_the_model_knows_its_tables() -> None:
    model, tokenizer = load_model("controlled")
    ids, prompt = controlled.draw_batch(tokenizer, 2, np.random.default_rng(6))
    with torch.no_grad():
        text, _ = controlled.losses(model, ids, prompt)
    assert text < 0.05


@pytest.mark.parametrize("name", CONTROLLED)
def test_relevance_is_what_the_rows_have_to_teach(name: str) -> None:
    """Counted from the rows: completion letters whose substitute the model does not know."""
    known, taught = known_tables(), Counter[str]()
    for row in load_task(name).train:
        operation, (letters, substitutes) = (
            row["prompt"].split()[0],
            (row["completion"].split()[::2], row["completion"].split()[1::2]),
        )
        for letter, substitute in zip(letters, substitutes, strict=True):
            taught[operation] += known[operation][letter] != substitute
    for layer, values in controlled.relevance("controlled", name).items():
        assert len(values) == 16
        assert sum(values) == pytest.approx(1)
        for operation, owned in controlled.assignment()[layer].items():
            expected = taught[operation] / taught.total() / 2
            assert [values[e] for e in owned] == pytest.approx([expected] * 2, abs=0.01)


def test_share_and_need_agree_in_one_task_and_disagree_in_the_other() -> None:
    agreement = {}
    for name, demand in DEMANDS.items():
        pairs = [[demand.share[o], demand.relevance[o]] for o in OPERATIONS]
        agreement[name] = float(np.corrcoef(np.argsort(np.argsort(pairs, axis=0), axis=0).T)[0, 1])
    assert agreement["controlled_share"] == pytest.approx(1)
    assert agreement["controlled_need"] < -0.2


def test_new_tables_are_permutations_with_as_many_changes_as_demanded() -> None:
    for demand in DEMANDS.values():
        for operation, table in new_tables(demand).items():
            assert sorted(table.values()) == sorted(LETTERS)
            changed = sum(table[c] != known_tables()[operation][c] for c in LETTERS)
            assert changed == round(demand.new[operation] * len(LETTERS))


def test_relevance_is_refused_where_nobody_knows_it() -> None:
    for model, task in (("embedded", "controlled_share"), ("controlled", "codes")):
        with pytest.raises(ValueError, match="relevance is known for the model 'controlled'"):
            controlled.relevance(model, task)


@pytest.mark.slow
def test_pretraining_teaches_text_and_routing() -> None:
    _, tokenizer = load_model("controlled")
    model = controlled.make_model(tokenizer, seed=1)
    ids, prompt = controlled.draw_batch(tokenizer, 4, np.random.default_rng(7))
    before = controlled.losses(model, ids, prompt)
    controlled.pretrain(model, tokenizer, steps=12, seed=1)
    after = controlled.losses(model, ids, prompt)
    assert all(new < old - 0.2 for new, old in zip(after, before, strict=True))


def test_the_shipped_weights_are_small() -> None:
    assert (SHIPPED["controlled"] / "model.safetensors").stat().st_size < 2_000_000


def test_entropy_and_distance_of_routings() -> None:
    even, first, other = np.full(16, 0.25), np.eye(16)[3], 2 * np.eye(16)[4]
    assert entropy(even) == pytest.approx(1)
    assert entropy(first) == 0
    assert distance({"a": first}, {"a": first}) == 0
    assert distance({"a": first, "b": first}, {"a": other, "b": first}) == 0.5

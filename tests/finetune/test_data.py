"""Which rows are trained on and which are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from drlora_torch.finetune.data import load_rows
from drlora_torch.finetune.options import FinetuneOptions


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, datasets.DatasetDict]:
    """Datasets that can be loaded by their id."""
    known: dict[str, datasets.DatasetDict] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda path: known[path])
    return known


def loaded(**options: Any) -> list[list[str]]:
    return [list(part["text"]) for part in load_rows(FinetuneOptions(model="m", **options))]


def test_the_held_out_split_is_used_and_never_the_training_split(
    hub: dict[str, datasets.DatasetDict],
) -> None:
    hub["own/data"] = datasets.DatasetDict(train=rows("a", "b"), test=rows("c"))
    hub["other/data"] = datasets.DatasetDict(train=rows("d"), validation=rows("e"), test=rows("f"))
    hub["only/train"] = datasets.DatasetDict(train=rows("g"))
    assert loaded(data="own/data") == [["a", "b"], ["c"]]
    assert loaded(data="own/data", eval_data="other/data") == [["a", "b"], ["e"]]
    assert loaded(data="own/data", eval_data="only/train") == [["a", "b"], ["g"]]


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_at_least_one_row_is_left_on_either_side(
    tmp_path: Path, fraction: float, held_out: int
) -> None:
    file = tmp_path / "four.jsonl"
    file.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(4)))
    train, test = loaded(data=str(file), eval_fraction=fraction)
    assert len(test) == held_out
    assert sorted(train + test) == ["0", "1", "2", "3"]

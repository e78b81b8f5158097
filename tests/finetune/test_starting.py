"""What a run takes from the adapter that it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from drlora_torch.errors import RunError
from drlora_torch.finetune.recipe import combine
from drlora_torch.finetune.starting import adopt
from tests.torch import helpers, models


@pytest.mark.parametrize("model", [None, "some/model"])
def test_ranks_that_are_not_given_are_those_of_the_adapter(
    tmp_path: Path, model: str | None
) -> None:
    """Those of the shipped run, which starts without arguments, are not given either."""
    adapter = helpers.attach(
        models.build(), config={"r_init": 0, "r_target": 5}, importance="fisher"
    )
    adapter.save_pretrained(tmp_path)
    named = {} if model is None else {"model": model, "data": "data.jsonl"}
    started = {**named, "adapter": str(tmp_path), "steps": 1}
    options = adopt(combine(started).options)
    assert (options.r_init, options.r_target, options.r_max) == (0, 5, 8)
    assert options.importance == "fisher"
    with pytest.raises(RunError, match="--r-init 3: the adapter to start from has 0, and keeps it"):
        adopt(combine({**started, "r_init": 3}).options)

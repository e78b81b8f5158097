"""``drlora push``: what goes to the hub, without a network and without a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from drlora_torch.finetune.after import opened
from tests.finetune.after.conftest import Call

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FILE = "drlora_adapter.safetensors"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hub's client is asked for; no model may be loaded."""
    asked: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked.append((repo_id, options))
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, **options: Any) -> None:
            asked.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(opened, "load_base", lambda *_: pytest.fail("a model was loaded"))
    return asked


def test_the_adapter_goes_up_with_a_card_of_its_ranks(
    run: Path, call: Call, calls: list[Any], tmp_path: Path
) -> None:
    mine = shutil.copytree(run, tmp_path / "run")
    said = call("push", mine, "me/sums", "--private")
    assert (said.code, said.out) == (0, "https://huggingface.co/me/sums\n")
    assert calls[0] == ("me/sums", {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == mine / "adapter"
    assert calls[1]["allow_patterns"] == [FILE, "README.md"]
    card = (mine / "adapter" / "README.md").read_text()
    assert 'drlora_torch.load(model, "me/sums", trainable=False)' in card
    assert "Ranks after 8 optimizer steps" in card
    assert card.count("| 8 | 16 |") == 2  # experts and total rank of both layers
    assert str(run.parent) not in card  # the base model is a local folder


def test_an_unfinished_run_sends_its_last_checkpoint(
    unfinished: Path, call: Call, calls: list[Any], tmp_path: Path
) -> None:
    mine = shutil.copytree(unfinished, tmp_path / "run")
    assert call("push", mine, "me/sums").code == 0
    assert calls[0] == ("me/sums", {"private": None, "exist_ok": True})
    assert calls[1]["folder_path"] == mine / "checkpoints" / "checkpoint-4"


@pytest.mark.parametrize(
    ("what", "made_by", "library"),
    [("peft", "drlora export", "peft"), ("merged", "drlora merge", "transformers")],
)
def test_other_folders_go_up_once_they_are_there(
    what: str, made_by: str, library: str, run: Path, call: Call, calls: list[Any], tmp_path: Path
) -> None:
    mine = tmp_path / "my run"
    shutil.copytree(run, mine)
    said = call("push", mine, "me/sums", "--what", what)
    assert said.code == 2
    assert f"does not exist; make it: {made_by} '{mine}'" in said.err
    assert calls == []
    (mine / what).mkdir()
    (mine / what / "weights").touch()
    assert call("push", mine, "me/sums", "--what", what).code == 0
    assert calls[1]["folder_path"] == mine / what
    assert calls[1]["allow_patterns"] is None
    card = huggingface_hub.ModelCard((mine / what / "README.md").read_text())
    assert card.data.library_name == library
    assert call("push", mine, "me/others", "--what", what).code == 0
    assert "# others" in (mine / what / "README.md").read_text()
    (mine / what / "README.md").write_text("my own words")
    assert call("push", mine, "me/sums", "--what", what).code == 0
    assert (mine / what / "README.md").read_text() == "my own words"


def test_a_failed_upload_is_a_sentence(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    said = call("push", run, "me/sums")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "could not be uploaded to 'me/sums': no network" in said.err
    assert not (run / "adapter" / "README.md").exists()

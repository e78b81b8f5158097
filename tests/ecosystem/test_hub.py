"""Ids of the hub, uploads and the model card, without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.storage.hub import model_card
from tests.torch import helpers, models

FILE = "drlora_adapter.safetensors"


@pytest.fixture
def adapter() -> drlora_torch.Adapter:
    adapter = helpers.attach(models.build())
    optimizer = helpers.adamw(adapter)
    for seed in range(4):
        helpers.step(adapter.model, optimizer, seed)
    return adapter


def test_an_id_is_fetched(
    adapter: drlora_torch.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.save_pretrained(tmp_path / "cache")
    asked: list[Any] = []

    def download(repo: str, name: str, revision: str | None) -> str:
        asked.append((repo, name, revision))
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = drlora_torch.load(models.build(), "someone/adapter", revision="v1")
    assert asked == [("someone/adapter", FILE, "v1")]
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)


def test_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, switched off, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(drlora_torch.CheckpointError, match=r"no adapter at someone/x: .*OFFLINE"):
        drlora_torch.load(models.build(), "someone/x")


def response(error: type[Exception]) -> Exception:
    """An answer of the hub; its constructor wants a response of whichever HTTP client there is."""
    return error.__new__(error, "nothing there")


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (lambda: response(errors.RepositoryNotFoundError), "no such repository on the hub"),
        (lambda: response(errors.RemoteEntryNotFoundError), "holds no drlora_adapter"),
        (lambda: TimeoutError("too slow\nmore"), "could not be fetched from the hub: too slow$"),
    ],
)
def test_what_the_hub_says_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Any, match: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(drlora_torch.CheckpointError, match=match):
        drlora_torch.load(models.build(), "someone/adapter")


@pytest.mark.parametrize("path", ["a/b/c", "./a/b", "../b", "/nowhere/x", "a", "a b/c"])
def test_paths_do_not_reach_the_network(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(drlora_torch.CheckpointError, match="no adapter at"):
        drlora_torch.load(models.build(), path)


# -- upload and card ---------------------------------------------------------------------------


class Api:
    """Stands for the hub's client."""

    calls: list[Any]

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        Api.calls.append(("create", repo_id, options))
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})()

    def upload_folder(self, **options: Any) -> None:
        Api.calls.append(("upload", options))


def test_push(
    adapter: drlora_torch.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Api.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    adapter.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert Api.calls[0] == ("create", "mine", {"private": True, "exist_ok": True})
    sent = Api.calls[1][1]
    assert sent["repo_id"] == "me/mine"
    assert sent["folder_path"] == tmp_path / "mine"
    assert sent["allow_patterns"] == [FILE, "README.md"]
    assert (tmp_path / "mine" / FILE).is_file()
    (tmp_path / "mine" / "README.md").write_text("my own words")
    adapter.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="org/name")
    assert Api.calls[2][1] == "org/name"
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"


def test_a_failed_push_keeps_the_files(
    adapter: drlora_torch.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(drlora_torch.CheckpointError, match=r"could not be uploaded .* no network$"):
        adapter.save_pretrained(tmp_path, push_to_hub=True)
    assert drlora_torch.load(models.build(), tmp_path).ranks()


def test_the_card_tells_ranks_and_configuration(adapter: drlora_torch.Adapter) -> None:
    adapter.model.config._name_or_path = "allenai/OLMoE-1B-7B-0924"
    card = model_card(state_of(adapter), "me/my-adapter")
    metadata = huggingface_hub.ModelCard(card).data
    assert metadata.base_model == "allenai/OLMoE-1B-7B-0924"
    assert metadata.library_name == "drlora"
    assert "# my-adapter" in card
    assert 'drlora_torch.load(model, "me/my-adapter", trainable=False)' in card
    assert "Ranks after 4 optimizer steps" in card
    for name, ranks in adapter.ranks().items():
        row = next(line for line in card.splitlines() if line.startswith(f"| `{name}`"))
        assert row.endswith(f"| {' '.join(map(str, ranks.tolist()))} |")
        assert f"| {ranks.sum()} |" in row
    assert re.search(r"\| `r_target` \| 4 \|", card)
    assert re.search(r"\| `alpha` \| 8.0 \|", card)


def test_the_card_names_no_local_folder(adapter: drlora_torch.Adapter, tmp_path: Path) -> None:
    adapter.model.config._name_or_path = str(tmp_path)
    card = model_card(state_of(adapter), "x")
    assert str(tmp_path) not in card
    assert "base_model:" not in card

"""``drlora merge``: a folder that serves the trained model without drlora."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drlora_torch.finetune.after import opened
from drlora_torch.finetune.after.merged import describe
from drlora_torch.merge import saving
from drlora_torch.merge.report import MergeReport
from tests.finetune.after.conftest import Call

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_the_merged_folder_is_the_trained_model_with_its_tokenizer(
    run: Path, call: Call, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    said = call("merge", run, "--output", target)
    assert said.code == 0, said.err
    assert f"{target}: merged model with its tokenizer; experts in float32" in said.out
    assert f"vllm serve {target}" in said.out
    tokens = AutoTokenizer.from_pretrained(target)("12+3=", return_tensors="pt")["input_ids"]
    trained = opened.open_run(run).model
    with torch.no_grad():
        expected = trained(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(target)(tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_the_chat_template_of_the_run_is_saved(
    run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}")
    copy = tmp_path / "run"
    (copy / "adapter").mkdir(parents=True)
    recipe = (run / "run.yaml").read_text()
    assert "chat_template: null" in recipe
    (copy / "run.yaml").write_text(
        recipe.replace("chat_template: null", f"chat_template: {template}")
    )
    name = "drlora_adapter.safetensors"
    (copy / "adapter" / name).write_bytes((run / "adapter" / name).read_bytes())
    assert call("merge", copy, "--no-compare").code == 0
    assert AutoTokenizer.from_pretrained(copy / "merged").chat_template == template.read_text()
    template.unlink()
    assert "own.jinja' cannot be read" in call("generate", copy, "hi").err


def test_a_failed_merge_leaves_nothing(
    run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "compare_logits", fail)
    said = call("merge", run, "--output", tmp_path / "merged")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert f"could not write a merged model to {tmp_path / 'merged'}: [Errno 28]" in said.err
    assert list(tmp_path.iterdir()) == []

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "tokenizer.json")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", no_space)
    said = call("merge", run, "--output", tmp_path / "new" / "merged")
    assert (said.code, said.err) == (2, "drlora: No space left on device: tokenizer.json\n"), (
        said.err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "error"), [(PreTrainedTokenizerBase, Exception), (PreTrainedModel, SafetensorError)]
)
def test_errors_of_libraries_in_rust_are_sentences(
    place: type, error: type[Exception], run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no kind for a full disk."""

    def no_space(*_: object, **__: object) -> None:
        raise error("No space left on device (os error 28)")

    monkeypatch.setattr(place, "save_pretrained", no_space)
    said = call("merge", run)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "internal error" not in said.err
    assert "could not write" in said.err
    assert not (run / "merged").exists()


@pytest.mark.parametrize(
    ("report", "packed", "words", "not_said"),
    [
        (MergeReport(Path("m"), "bfloat16", 0.02, 0.001, 0.3), False, "0.10%; those of", "wider"),
        (MergeReport(Path("m"), "bfloat16", 2.5), False, "use a wider --dtype", "logits"),
        (MergeReport(Path("m"), "nf4", 0.5), True, "import drlora_torch; Auto", "vllm"),
    ],
)
def test_a_report_says_what_counts(
    report: MergeReport, packed: bool, words: str, not_said: str
) -> None:
    said = describe(report, packed)
    assert words in said
    assert not_said not in said

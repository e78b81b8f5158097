"""From data to what a trainer takes: splits, cutting, counting, streaming, what is refused."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from drlora_core.cli.console import make_console
from drlora_torch.errors import DataError, ModelError, RunError
from drlora_torch.finetune import inputs
from drlora_torch.finetune.data import summary
from drlora_torch.finetune.data.encode import Encoded
from drlora_torch.finetune.data.prepare import Prepared, prepare
from drlora_torch.finetune.data.splits import read
from drlora_torch.finetune.options import FinetuneOptions
from tests.finetune.conftest import make_tokenizer


def options_for(data: Any, **options: Any) -> FinetuneOptions:
    return FinetuneOptions(model="m", data=str(data), **options)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(data: Any, **options: Any) -> Prepared:
    given = options_for(data, **options)
    return prepare(read(given, chat=False), given, make_tokenizer(), Console(quiet=True))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, datasets.DatasetDict]:
    """Datasets that can be loaded by their id."""
    known: dict[str, datasets.DatasetDict] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, streaming: known[path])
    return known


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


def loaded(**options: Any) -> list[list[str]]:
    found = read(FinetuneOptions(model="m", **options), chat=False)
    return [[row["text"] for row, _ in part.examples] for part in (found.train, found.held_out)]


def test_the_held_out_split_is_used_and_never_the_training_split(
    hub: dict[str, datasets.DatasetDict],
) -> None:
    hub["own/data"] = datasets.DatasetDict(train=rows("a", "b"), test=rows("c"))
    hub["other/data"] = datasets.DatasetDict(train=rows("d"), validation=rows("e"), test=rows("f"))
    hub["only/train"] = datasets.DatasetDict(train=rows("g"))
    assert loaded(data="own/data") == [["a", "b"], ["c"]]
    assert loaded(data="own/data", eval_data="other/data") == [["a", "b"], ["e"]]
    assert loaded(data="own/data", eval_data="only/train") == [["a", "b"], ["g"]]


def test_a_dataset_without_the_split_to_train_on_is_refused(
    hub: dict[str, datasets.DatasetDict],
) -> None:
    hub["odd/data"] = datasets.DatasetDict(test=rows("a"), train_sft=rows("b", "c"))
    with pytest.raises(DataError, match=r"no split 'train' .*it has test, train_sft.*--split"):
        loaded(data="odd/data")
    assert loaded(data="odd/data", split="train_sft") == [["b", "c"], ["a"]]


def test_held_out_files_alone_can_be_evaluated_on(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    write(tmp_path / "held" / "validation.jsonl", [{"text": "v"}])
    file = write(tmp_path / "a.jsonl", [{"text": "a"}] * 2)
    assert loaded(data=str(file), eval_data=str(tmp_path / "held")) == [["a", "a"], ["v"]]
    with pytest.raises(DataError, match="no split 'train'"):
        loaded(data=str(tmp_path / "held"))


def test_a_change_far_into_a_stream_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drlora_torch.finetune.data.splits.LOOKED_AT", 2)
    texts = [{"text": letter} for letter in "abcdef"]
    held = str(write(tmp_path / "held.jsonl", texts[:2]))
    digests = set()
    for last in "fg":
        file = write(tmp_path / "a.jsonl", [*texts[:-1], {"text": last}])
        made = prepared(file, streaming=True, steps=1, eval_data=held)
        digests.add(made.summary.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_at_least_one_row_is_left_on_either_side(
    tmp_path: Path, fraction: float, held_out: int
) -> None:
    file = write(tmp_path / "four.jsonl", [{"text": str(i)} for i in range(4)])
    train, test = loaded(data=str(file), eval_fraction=fraction)
    assert len(test) == held_out
    assert sorted(train + test) == ["0", "1", "2", "3"]


def test_a_folder_may_hold_what_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a"}])
    write(tmp_path / "test.jsonl", [{"text": "b"}])
    assert loaded(data=str(tmp_path)) == [["a"], ["b"]]


def test_rows_are_cut_dropped_and_counted(tmp_path: Path) -> None:
    """Every character is a token, and so is the end."""
    lengths = [(2, 2), (3, 9), (6, 1), (9, 9)]
    pairs = [{"prompt": "p" * p, "completion": "c" * c} for p, c in lengths]
    file = write(tmp_path / "a.jsonl", pairs)
    made = prepared(file, eval_data=str(file), max_length=7)
    assert (made.summary.rows, made.summary.cut, made.summary.dropped) == (3, 2, 1)
    assert made.summary.read == 4
    assert made.summary.longest == 19
    assert made.summary.tokens == 5 + 7 + 7
    assert made.summary.loss_tokens == 3 + 4 + 1
    assert made.summary.held_out == 3
    assert made.summary.example == "pp[[cc<eos>]]"
    assert [len(row) for row in made.train["input_ids"]] == [5, 7, 7]
    assert made.sequences == 3


def test_packing_counts_sequences(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "abc"}] * 5)
    made = prepared(file, eval_data=str(file), max_length=8, packing=True)
    assert made.sequences == 3  # two rows of 4 tokens fit into one
    assert options_for(file, epochs=2, batch_size=2).resolved(made.sequences).steps == 4


def test_preference_pairs_are_left_to_their_trainer(tmp_path: Path) -> None:
    pairs = [{"prompt": "p", "chosen": "cc", "rejected": "r"}] * 2
    file = write(tmp_path / "a.jsonl", pairs)
    made = prepared(file, eval_data=str(file), method="dpo")
    assert list(made.train) == pairs
    assert (made.summary.tokens, made.summary.loss_tokens) == (2 * (4 + 3), 2 * (3 + 2))


def test_a_stream_reads_again_for_every_epoch(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": str(i)} for i in range(8)])
    given: dict[str, Any] = {"steps": 3, "eval_data": str(file)}
    stream, whole = (prepared(file, streaming=on, **given) for on in (True, False))
    assert not stream.summary.complete
    assert stream.sequences is None
    found = [row["input_ids"] for row in itertools.islice(stream.train, 24)]
    passes = [found[:8], found[8:16], found[16:]]
    for each in passes:
        assert sorted(each) == sorted(whole.train["input_ids"])
    assert passes[0] != passes[1] != passes[2]  # each in an order of its own


def test_a_bad_row_far_into_a_streamed_file_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drlora_torch.finetune.data.splits.LOOKED_AT", 2)
    file = write(tmp_path / "a.jsonl", [{"text": "a"}] * 5 + [{"text": None}])
    with pytest.raises(DataError, match=r"a.jsonl, line 6: text must be a text, got null"):
        prepared(file, streaming=True, steps=3, eval_data=str(file))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 2}, "no row has a token that bears loss within --max-length 2"),
        ({"streaming": True, "steps": 3}, "--streaming needs --eval-data"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    pairs = [{"prompt": "prompt", "completion": "c"}] * 3
    with pytest.raises(DataError, match=sentence):
        prepared(write(tmp_path / "a.jsonl", pairs), **options)


class Empty:
    """A tokenizer as Transformers makes one for a folder that has none."""

    pad_token = eos_token = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'m' has no tokenizer, or one with an empty vocabulary"):
        inputs.check_tokenizer(Empty(), "m")
    made = make_tokenizer()
    made.pad_token = None
    inputs.check_tokenizer(made, "m")  # padded with the end of a sequence
    made.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence token"):
        inputs.check_tokenizer(made, "m")


def test_token_ids_without_an_embedding_are_refused() -> None:
    class Config:
        vocab_size = 100

        def get_text_config(self) -> Config:
            return self

    made = make_tokenizer()
    assert made.pad_token_id == 1
    inputs.check_vocabulary(Config(), made, 99, "m")
    with pytest.raises(ModelError, match=r"makes token id 100, .* embeddings for 100 tokens"):
        inputs.check_vocabulary(Config(), made, 100, "m")
    Config.vocab_size = 1
    with pytest.raises(ModelError, match="makes token id 1,"):
        inputs.check_vocabulary(Config(), made, 0, "m")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"\xff", "cannot be read"),
        (b"a\n{% for %}", "line 2: not Jinja"),
    ],
)
def test_a_bad_chat_template_is_refused(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "t.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RunError, match=f"--chat-template '.*t.jinja'.*{sentence}"):
        inputs.read_template(file)
    good = "{% generation %}{{ messages }}{% endgeneration %}{% break %}"
    file.write_text("{% for m in messages %}" + good + "{% endfor %}")
    assert inputs.read_template(file).startswith("{% for")


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "abc"}] * 5)
    first = prepared(file, eval_data=str(file)).summary
    summary.write(tmp_path, first)
    summary.check_same(tmp_path, first)
    write(file, [{"text": "abc"}] * 4 + [{"text": "abd"}])
    with pytest.raises(RunError, match=r"the training data has changed since .*5 rows, 20 tokens"):
        summary.check_same(tmp_path, prepared(file, eval_data=str(file)).summary)


def test_the_summary_is_shown_in_narrow_windows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "[bold]abc", "source": "x"}] * 5)
    made = prepared(file, eval_data=str(file)).summary
    screen = io.StringIO()
    summary.show(Console(width=40, file=screen), made, steps=10, rows_per_step=2, sequences=5)
    text = screen.getvalue()
    assert "…" not in text
    for part in (
        "rows to train on",
        "ignored columns",
        "source",
        "3.33",
        "[[[bold]abc<eos>]]",
    ):
        assert part in text


def test_marks_follow_the_labels() -> None:
    tokens = make_tokenizer()("abcd")["input_ids"]
    labels = [-100, tokens[1], tokens[2], -100]
    assert summary.mark(make_tokenizer(), Encoded(tokens, labels)) == "a[[bc]]d"


def test_an_example_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fields = dict.fromkeys(summary.Summary.model_fields, 1)
    texts = {"format": "text", "ignored": ("\x1b[31m",), "example": "\x1b]0;x\x07", "digest": ""}
    summary.show(make_console(), summary.Summary.model_validate({**fields, **texts}), 1, 1, 1)
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07"}
    assert r"\u001b]0;x" in out

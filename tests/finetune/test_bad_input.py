"""Wrong inputs of ``drlora finetune``: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bad_files import check_refused
from tests.finetune.test_prepare import write

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PAIR = {"prompt": "1+1=", "completion": "2"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "good": [PAIR] * 4,
    "null": [PAIR, {**PAIR, "completion": None}],
    "number": [PAIR, {**PAIR, "completion": 2}],
    "mixed": [{"text": "a"}, {"text": ["a"]}],
    "short": [PAIR, {"prompt": "x"}],
    "question": [{"ask": "a", "reply": "b"}] * 4,
    "chat": [{"messages": [{"role": "assistant", "content": "a"}]}] * 4,
    "deaf": [{"messages": [{"role": "user", "content": "a"}]}] * 4,
    "image": [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}] * 4,
    "pairs": [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 4,
    "one": [PAIR],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, moe_folder: Path) -> Path:
    """A folder with models and data, good and bad."""
    folder = tmp_path_factory.mktemp("bad")
    for name, rows in ROWS.items():
        write(folder / f"{name}.jsonl", rows)
    (folder / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1") * 3)
    (folder / "half.jsonl").write_text('{"text": "a"}\n{"text":')
    (folder / "empty.jsonl").touch()
    (folder / "good.md").touch()
    (folder / "nothing").mkdir()
    (folder / "file").touch()
    (folder / "chat.jinja").write_text(CHAT)
    (folder / "broken.jinja").write_text("{% if %}")
    (folder / "bad.yaml").write_text("lerning_rate: 1\n")
    (folder / "twice.yaml").write_text("steps: 1\nsteps: 2\n")
    (folder / "clash.yaml").write_text("model: m\ndata: good.jsonl\nsteps: 3\nepochs: 1\n")
    shutil.copytree(moe_folder, folder / "moe")
    shutil.copytree(moe_folder, folder / "untokenized")
    for file in (folder / "untokenized").glob("tokenizer*"):
        file.unlink()
    shutil.copytree(moe_folder, folder / "small")
    config = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    return folder


CASES = {
    "moe": "a MODEL needs DATA",
    "gone good.jsonl": "'gone' could not be loaded",
    "nothing good.jsonl": "'nothing' is not the folder of a model: it has no config.json",
    "untokenized good.jsonl": "'untokenized' has no tokenizer, or one with an empty vocabulary",
    "small good.jsonl": "but the model has embeddings for 20 tokens",
    "moe gone.jsonl": "there is no such file",
    "moe good.md": "must end in one of .jsonl",
    "moe nothing": "the folder holds no file",
    "moe empty.jsonl": "has no rows",
    "moe half.jsonl": "half.jsonl, line 2: not JSON",
    "moe latin.jsonl": "latin.jsonl, line 1: not UTF-8",
    "moe null.jsonl": "null.jsonl, line 2: completion must be a text, got null",
    "moe number.jsonl": "number.jsonl, line 2: completion must be a text, got the number 2",
    "moe mixed.jsonl": "mixed.jsonl, line 2: text must be a text, got a list",
    "moe short.jsonl": "short.jsonl, line 2: has no completion",
    "moe question.jsonl": "--columns prompt=ask,completion=reply",
    "moe one.jsonl": "give it at least 2",
    "moe chat.jsonl": "has no chat template",
    "moe deaf.jsonl --chat-template chat.jinja": "no message with role assistant",
    "moe image.jsonl --chat-template chat.jinja": "must be a part of type text",
    "moe chat.jsonl --chat-template broken.jinja": "line 1: not Jinja",
    "moe chat.jsonl --chat-template gone.jinja": "cannot be read",
    "moe good.jsonl --max-length 2": "within --max-length 2",
    "moe good.jsonl --max-length 1": "max_length: must be at least 2, got 1",
    "moe good.jsonl --columns prompt": "write FIELD=COLUMN",
    "moe good.jsonl --columns promt=prompt": "did you mean 'prompt'",
    "moe good.jsonl --method dpo": "accepted: chosen and rejected",
    "moe pairs.jsonl": "has columns prompt, chosen, rejected",
    "moe good.jsonl --steps 3 --epochs 1": "give steps or epochs, not both",
    "moe good.jsonl --steps 0": "steps: must be at least 1, got 0",
    "moe good.jsonl --learning-rate nan": "learning_rate: must be a finite number",
    "moe good.jsonl --learning-rate fast": "--learning-rate: ",
    "moe good.jsonl --optimizer adam": "'adam' is not one of",
    "moe good.jsonl --lr 1": "did you mean --learning-rate?",
    "moe good.jsonl --growth-end 500": "but the training ends after step 200",
    "moe good.jsonl --r-target 99": "r_target 99 > r_max 32",
    "moe good.jsonl --patience 2": "patience needs eval_every",
    "moe good.jsonl --streaming": "streaming needs steps",
    "moe good.jsonl --streaming --steps 3": "--streaming needs --eval-data",
    "moe good.jsonl --report-to tensorbord": "did you mean 'tensorboard'?",
    "moe good.jsonl --modules-to-save lm_hed": "did you mean 'lm_head'?",
    "moe good.jsonl --attention-targets q_proj": "need attention_rank",
    "moe good.jsonl --attention-rank 2 --attention-targets q_prj": "did you mean 'q_proj'",
    "moe good.jsonl --adapter nothing": "no adapter of drlora",
    "moe good.jsonl --output file": "exists; use another --output",
    "moe good.jsonl --output file/run": "file' is a file",
    "--config bad.yaml": "no option 'lerning_rate'; did you mean 'learning_rate'?",
    "--config twice.yaml": "option 'steps' is there twice",
    "--config clash.yaml": "give steps or epochs, not both",
    "--config gone.yaml": "cannot be read",
    "--resume nothing": "is not the folder of a run: it has no run.yaml",
    "--resume nothing --r-max 3": "leave out --r-max",
    "--resume nothing --config bad.yaml": "leave out --config",
    "--processes 0": "processes: must be at least 1, got 0",
    "--fsdp-size 2": "use --processes 2",
}


@pytest.mark.parametrize("line", CASES)
def test_wrong_input_is_one_sentence(
    line: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_refused(capsys, place, ["finetune", *line.split()], CASES[line])

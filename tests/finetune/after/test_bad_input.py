"""Wrong inputs of the commands after a run: one sentence, exit status 2, and nothing is left."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from tests.finetune.after.conftest import Call

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FILE = "drlora_adapter.safetensors"
NO_RUN = {
    "nowhere": "'nowhere' is not the folder of a run: it has no run.yaml",
    "empty": "'empty' is not the folder of a run: it has no run.yaml",
    "file": "'file' is not the folder of a run: it has no run.yaml",
    "broken": "'broken/run.yaml' cannot be read",
    "other": "no option 'learning_rat'; did you mean 'learning_rate'",
    "young": "has saved no adapter yet; go on with it: drlora finetune --resume young",
}
"""Folders, in the working directory of each test, that hold no run to use."""
NO_MODEL = {
    "damaged": f"damaged/adapter/{FILE} is damaged or truncated",
    "moved": "'/no/such/model' is not the folder of a model",
}
"""Runs whose adapter or model cannot be loaded."""
GENERATE = {
    "no tokens": (["run", ""], "the prompt '' has no tokens"),
    "no template": (["run", "hi", "--chat"], "the tokenizer of this run has no chat template"),
    "system": (["run", "hi", "--system", "be short"], "--system needs the chat template"),
    "cold": (["run", "hi", "--temperature", "-1"], "temperature: must be at least 0"),
    "nearly cold": (["run", "hi", "--temperature", "1e-9"], "must be 0 or at least 0.01"),
    "nan": (["run", "hi", "--temperature", "nan"], "temperature: must be a finite number"),
    "top": (["run", "hi", "--top-p", "1.5", "--temperature", "1"], "top_p: must be"),
    "greedy": (["run", "hi", "--top-p", "0.9"], "top_p needs a temperature above 0"),
    "length": (["run", "hi", "--max-new-tokens", "0"], "max_new_tokens: must be at least 1, got 0"),
    "seed": (["run", "hi", "--seed", "-1"], "seed: must be at least 0 and below"),
    "argument": (["run", "\udcff"], "the prompt is not UTF-8: '\\udcff'"),
    "unknown form": (["untold", "hi"], "add --chat to use the chat template, or --plain"),
    "stdin": (["run", "-"], "standard input is not utf-8"),
}
MERGE = {
    "taken": (["run", "--output", "taken"], "'taken' exists; use another --output"),
    "a file": (["run", "--output", "file"], "'file' exists; use another --output"),
    "inside": (["run", "--output", "file/x"], "'file' is a file, so that 'file/x' cannot"),
    "packed": (["run", "--quantize"], "--quantize packs experts again, and this run did not"),
}
EXPORT = {
    "taken": (["run", "--output", "taken"], "'taken' exists; use another --output"),
    "a file": (["run", "--output", "file"], "'file' exists; use another --output"),
    "inside": (["run", "--output", "file/x"], "'file' is a file, so that 'file/x' cannot"),
}
EVALUATE = {
    "no data": (["run", "no.jsonl"], "data 'no.jsonl': there is no such file"),
    "ending": (["run", "file.jsn"], "did you mean"),
    "empty": (["run", "empty.jsonl"], "has no rows"),
    "folder": (["run", "empty"], "the folder holds no file"),
    "columns": (["run", "other.jsonl"], "has columns q, a; accepted: "),
    "no column": (["run", "other.jsonl", "--columns", "text=x"], "no column 'x' (--columns)"),
    "words": (["run", "other.jsonl", "--columns", "text"], "write FIELD=COLUMN"),
    "own columns": (["run", "--columns", "text=q"], "--columns needs DATA"),
    "messages": (["run", "chat.jsonl"], "the tokenizer of this run no chat template"),
    "batch": (["run", "--batch-size", "0"], "batch_size: must be at least 1, got 0"),
    "limit": (["run", "--limit", "0"], "limit: must be at least 1, got 0"),
    "texts": (["run", "text.txt", "--exact-match"], "text.txt, line 1, has none"),
    "harness": (["run", "--tasks", "gsm8k"], "--tasks needs lm-eval, which is not installed"),
    "no task": (["run", "--tasks", ","], "tasks: "),
}
PUSH = {
    "word": (["run", "name"], "REPO_ID 'name' must be OWNER/NAME"),
    "path": (["run", "./a/b"], "REPO_ID './a/b' must be OWNER/NAME"),
    "url": (["run", "https://huggingface.co/a/b"], "must be OWNER/NAME"),
    "peft": (["run", "a/b", "--what", "peft"], "does not exist; make it: drlora export run"),
    "merged": (["run", "a/b", "--what", "merged"], "does not exist; make it: drlora merge run"),
    "offline": (["run", "a/b"], "could not be uploaded to 'a/b': "),
}
MORE = {"generate": ["hi"], "push": ["a/b"]}
CASES = [
    pytest.param([command, *words], sentence, id=f"{command}, {name}")
    for command, own in (
        ("generate", GENERATE),
        ("merge", MERGE),
        ("export", EXPORT),
        ("evaluate", EVALUATE),
        ("push", PUSH),
    )
    for name, (words, sentence) in {
        **{name: ([name, *MORE.get(command, [])], said) for name, said in NO_RUN.items()},
        **(
            {}
            if command == "push"
            else {name: ([name, *MORE.get(command, [])], said) for name, said in NO_MODEL.items()}
        ),
        **own,
    }.items()
]


@pytest.fixture(scope="module")
def place(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a run, and with much that is none."""
    path = tmp_path_factory.mktemp("place")
    shutil.copytree(run, path / "run")
    shutil.copytree(run, path / "untold", ignore=shutil.ignore_patterns("data.json"))
    recipe = (run / "run.yaml").read_text()
    for name in ("empty", "taken", "broken", "other", "young", "damaged/adapter", "moved/adapter"):
        (path / name).mkdir(parents=True)
    (path / "taken" / "mine").touch()
    (path / "file").touch()
    (path / "broken" / "run.yaml").write_text("{")
    (path / "other" / "run.yaml").write_text("learning_rat: 1")
    (path / "young" / "run.yaml").write_text(recipe)
    (path / "damaged" / "run.yaml").write_text(recipe)
    for name in ("damaged", "moved"):
        shutil.copy(run / "data.json", path / name)
    content = (run / "adapter" / FILE).read_bytes()
    (path / "damaged" / "adapter" / FILE).write_bytes(content[:-9])
    (path / "moved" / "adapter" / FILE).write_bytes(content)
    lines = [
        "model: /no/such/model" if line.startswith("model:") else line
        for line in recipe.splitlines()
    ]
    (path / "moved" / "run.yaml").write_text("\n".join(lines))
    (path / "file.jsn").write_text("{}")
    (path / "empty.jsonl").touch()
    (path / "other.jsonl").write_text('{"q": "1", "a": "2"}\n')
    (path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (path / "text.txt").write_text("some text")
    return path


@pytest.mark.parametrize(("words", "sentence"), CASES)
def test_it_is_one_sentence(
    words: list[str], sentence: str, place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    said = call(*words)
    assert said.code == 2
    assert sentence in said.err
    assert said.err.startswith("drlora: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


@pytest.mark.parametrize("command", ["generate", "merge", "evaluate", "push", "export"])
def test_help_is_there_without_a_run(command: str, call: Call) -> None:
    said = call(command, "--help")
    assert said.code == 0
    assert "Folder of a run of drlora finetune" in said.out

"""What a fine-tuning reads before its model: rows in every format, templates, tokenizers."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from rich.console import Console

from drlora_torch.embedded import MODEL_DIR
from drlora_torch.finetune.data import files
from drlora_torch.finetune.data.formats import Reader
from drlora_torch.finetune.data.prepare import prepare
from drlora_torch.finetune.data.splits import read
from drlora_torch.finetune.inputs import check_tokenizer, check_vocabulary, read_template
from drlora_torch.finetune.model import load_config, load_tokenizer
from drlora_torch.finetune.options import FinetuneOptions
from scripts.fuzz.targets import Target, each

QUIET = Console(quiet=True)
CHAT = [{"role": "user", "content": "sey 6 1"}, {"role": "assistant", "content": "6ty 1ka"}]
TURNS = [{"from": "human", "value": "sey 6"}, {"from": "gpt", "value": "6ty"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages.jsonl": [{"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {"k": 1}}] * 3,
    "turns.json": [{"conversations": TURNS, "system": "s"}] * 3,
    "pairs.jsonl": [{"prompt": "sey 6 ->", "completion": " 6ty"}] * 3,
    "zipped.jsonl.gz": [{"instruction": "sey", "input": "6", "output": "6ty"}] * 3,
    "table.csv": [{"question": "sey, 6", "answer": '"6ty"'}] * 3,
    "table.parquet": [{"messages": CHAT, "number": 1}] * 3,
    "preferences.jsonl": [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}] * 3,
    "plain.txt": [],
}


def write_rows(folder: Path) -> None:
    for name, rows in ROWS.items():
        (folder / name).write_bytes(_encode(name, rows))


def _encode(name: str, rows: list[dict[str, Any]]) -> bytes:
    match name.partition(".")[2]:
        case "json":
            return json.dumps(rows).encode()
        case "csv":
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
            return text.getvalue().encode()
        case "parquet":
            stream = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
            return stream.getvalue()
        case "txt":
            return b"one\nparagraph\n\nanother\n"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(lines, mtime=0) if name.endswith(".gz") else lines


def read_rows(folder: Path) -> None:
    """Read every file, with and without a chat template."""
    for file in sorted(folder.iterdir()):
        method = "dpo" if file.name.startswith("preferences") else "sft"
        for chat in (True, False):
            reader = Reader(file.name, method, None, chat)
            each(lambda file=file, reader=reader: list(map(reader.read, files.read_file(file))))


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(str(MODEL_DIR))


def write_tokens(folder: Path) -> None:
    for name in ("messages.jsonl", "pairs.jsonl"):
        (folder / name).write_bytes(_encode(name, ROWS[name]))


def read_tokens(folder: Path) -> None:
    """Tokenize what was read."""
    for file in sorted(folder.iterdir()):
        options = FinetuneOptions(model=str(MODEL_DIR), data=str(file), steps=40, max_length=64)
        each(lambda options=options: prepare(read(options, True), options, tokenizer(), QUIET))


def write_template(folder: Path) -> None:
    shutil.copy(MODEL_DIR / "chat_template.jinja", folder / "template.jinja")
    write_tokens(folder)


def read_with_template(folder: Path) -> None:
    """Tokenize by a template of a stranger."""
    own = tokenizer().chat_template
    try:
        tokenizer().chat_template = read_template(folder / "template.jinja")
        options = FinetuneOptions(
            model=str(MODEL_DIR), data=str(folder / "messages.jsonl"), steps=40, max_length=64
        )
        prepare(read(options, True), options, tokenizer(), QUIET)
    finally:
        tokenizer().chat_template = own


TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json")


def write_tokenizer(folder: Path) -> None:
    for name in TOKENIZER:
        shutil.copy(MODEL_DIR / name, folder / name)


def read_tokenizer(folder: Path) -> None:
    config, loaded = load_config(str(folder)), load_tokenizer(str(folder))
    check_tokenizer(loaded, str(folder))
    check_vocabulary(config, loaded, 3, str(folder))


TARGETS = {
    "rows": Target(write_rows, read_rows, ("*",)),
    "tokens": Target(write_tokens, read_tokens, ("*.jsonl",), share=0.1),
    "template": Target(write_template, read_with_template, ("template.jinja",), share=0.1),
    "tokenizer": Target(write_tokenizer, read_tokenizer, TOKENIZER, share=0.05),
}

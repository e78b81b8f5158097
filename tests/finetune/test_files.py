"""Rows of files: every format, and what is wrong with a file is said with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from drlora_torch.errors import DataError
from drlora_torch.finetune.data import files
from drlora_torch.finetune.data.files import find_files, read_file

ROWS = [{"prompt": "größe 1", "completion": "a, b"}, {"prompt": "two\nlines", "completion": "«c»"}]


def as_csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), content)
    return content.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
WRITTEN = {
    "a.jsonl": LINES.encode(),
    "raw.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode("utf-8-sig"),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES.encode(),
    "a.csv": as_csv(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.gz": gzip.compress(as_csv()),
    "a.parquet": as_parquet(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITTEN[name])
    found = list(read_file(tmp_path / name))
    assert [row.values for row in found] == ROWS
    assert all(row.place.startswith(f"{name}, ") for row in found)
    assert len({row.place for row in found}) == 2


def test_blank_lines_separate_the_rows_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n \n\nthree", encoding="utf-8")
    found = list(read_file(tmp_path / "a.txt"))
    assert [(row.values["text"], row.place) for row in found] == [
        ("one\ntwo", "a.txt, line 3"),
        ("three", "a.txt, line 7"),
    ]


BAD: dict[str, tuple[str, bytes, str]] = {
    "latin-1": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xe9"}',
        "a.jsonl, line 2: not UTF-8 .byte 0xe9",
    ),
    "latin-1, csv": ("a.csv", b"text\nabc\n\xe9t\xe9\n", "a.csv, line 3: not UTF-8"),
    "latin-1, text": ("a.txt", b"abc\n\n\xe9", "a.txt, line 3: not UTF-8"),
    "truncated": ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2: not JSON"),
    "no object": (
        "a.jsonl",
        b'{"text": "a"}\n["a"]',
        "line 2: a row must be an object with columns, got",
    ),
    "no rows": ("a.json", b'"a"', "must hold an array of objects"),
    "not JSON": ("a.json", b"nonsense", "a.json: not JSON"),
    "deep": ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    "no gzip": ("a.jsonl.gz", b"{}", "a.jsonl.gz' cannot be read: Not a gzipped file"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cannot be read: Compressed"),
    "too many cells": (
        "a.csv",
        b"a,b\n1,2\n1,2,3\n",
        "a.csv, row 2: has another number of columns",
    ),
    "too few cells": ("a.csv", b"a,b\n1\n", "a.csv, row 1: has another number of columns"),
    "twice": ("a.csv", b"a,b,a\n1,2,3\n", "a.csv: a column is there twice in a, b, a"),
    "open quote": ("a.csv", b'a,b\n"1,2\n', "not CSV"),
    "no parquet": ("a.parquet", b"PAR1", "a.parquet: not Parquet"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_the_place(case: str, tmp_path: Path) -> None:
    name, content, sentence = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        list(read_file(tmp_path / name))


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    names = (
        "b.jsonl",
        "train-1.csv",
        "sub/valid.json",
        "test_x.parquet",
        "trainer.txt",
        "notes.md",
        ".hidden.jsonl",
        ".ipynb_checkpoints/a.jsonl",
        "run/run.yaml",
        "run/data.json",
        "test/c.jsonl",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {split: [f.name for f in files] for split, files in find_files(tmp_path).items()}
    assert found == {
        "train": ["b.jsonl", "train-1.csv", "trainer.txt"],
        "validation": ["valid.json"],
        "test": ["c.jsonl", "test_x.parquet"],
    }


@pytest.mark.parametrize(
    ("names", "given", "sentence"),
    [
        ([], "nothing.jsonl", "there is no such file"),
        (["a.jsonln"], "a.jsonln", "must end in one of .jsonl, .*did you mean '.jsonl'"),
        (["a.parquet.gz"], "a.parquet.gz", "must end in one of"),
        (["a"], "a", "must end in one of"),
        (["folder/a.md"], "folder", "the folder holds no file that ends in"),
        (["folder/.a.jsonl"], "folder", "the folder holds no file that ends in"),
        (["folder/run.yaml", "folder/data.json"], "folder", "the folder holds no file"),
    ],
)
def test_what_is_no_data_is_refused(
    names: list[str], given: str, sentence: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=sentence):
        find_files(tmp_path / given)


def test_one_object_is_a_row(tmp_path: Path) -> None:
    row: dict[str, Any] = {"text": "a"}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert [found.values for found in read_file(tmp_path / "a.json")] == [row]


def test_a_file_that_unpacks_to_far_more_than_it_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SMALL", 2**16)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 2**22))
    column = pyarrow.array(["a" * 2**16] * 1000)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "bomb.parquet")
    with pytest.raises(DataError, match=r"bomb.txt.gz unpacks to more than .* 100 times its size"):
        list(read_file(tmp_path / "bomb.txt.gz"))
    with pytest.raises(DataError, match=r"bomb.parquet: 256 rows from row 1 on unpack to"):
        list(read_file(tmp_path / "bomb.parquet"))


def test_damage_inside_of_packed_files_is_said(tmp_path: Path) -> None:
    good = gzip.compress(b'{"text": "a few words that are packed"}\n' * 9, mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(good[:10] + b"\x07" + good[11:])
    buffers = [pyarrow.py_buffer(each) for each in (b"\0\0\0\0\2\0\0\0", b"\xf9\xf9")]
    column = pyarrow.StringArray.from_buffers(1, *buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    for name, message in (
        ("a.jsonl.gz", "cannot be read: .*invalid block type"),
        ("a.parquet", "not Parquet"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_file(tmp_path / name))

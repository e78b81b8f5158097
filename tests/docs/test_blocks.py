"""Every block of code in README and docs runs, or says why not; every command exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drlora_torch.finetune.data.files import Row
from drlora_torch.finetune.data.formats import Reader
from tests.docs import fragments, pages, shell

CODE = [
    page for page in pages.PAGES if re.search("```(python|pycon|json|yaml)\n", pages.read(page))
]
SHELL = [page for page in pages.PAGES if "```bash\n" in pages.read(page)]
ELSEWHERE = {"README.md", "docs/adding_a_model.md"}
"""Pages whose one program has a test of its own (test_readme, torch/conventions)."""
SLOW = {
    "docs/ecosystem.md",
    "docs/howto/own_loop.md",
    "docs/howto/trainer_and_trl.md",
    "docs/quickstart.md",
}
SKIPPED = 25  # blocks that cannot run here; lower it when there are fewer


@pytest.mark.parametrize("page", pages.PAGES)
def test_blocks_are_in_languages_that_are_checked(page: str) -> None:
    fences = re.findall(r"^ *```(.*)$", pages.read(page), flags=re.M)
    assert set(fences[::2]) <= pages.LANGUAGES
    assert set(fences[1::2]) <= {""}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in CODE
        if page not in ELSEWHERE
    ],
)
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = pages.parse(page, "python", "pycon", "json", "yaml")
    document.namespace.update(fragments.names_for(page, tmp_path))
    ran, reasons = pages.run(document)
    assert ran or reasons
    assert all(reasons)


@pytest.mark.parametrize("page", SHELL)
def test_the_commands_of_a_page_exist(page: str) -> None:
    for block in re.findall(r"^ *```bash\n(.*?)```", pages.read(page), flags=re.M | re.S):
        for words in shell.split(block):
            shell.check(words)


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_commands_in_the_text_of_a_page_exist(page: str) -> None:
    text = re.sub(r"```.*?```", "", pages.read(page), flags=re.S)
    for command in re.findall(r"`(drlora [a-z]+ [^`\[]*)`", text):
        words = re.sub(r"\b[A-Z]\b", "1", command.replace("...", "")).split()
        if words[-1] in shell.options_with_values(words[1]):  # the text says that it exists
            words.append("1")
        shell.check(words)


TESTED_ELSEWHERE = ("docs/after_training.md", "docs/examples.md")
"""Their commands are those of tests/finetune/after and of tests/test_examples.py."""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the tutorial trains for 200 steps
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.exhaustive] if p in TESTED_ELSEWHERE else [])
        for p in SHELL
    ],
)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(pages.ROOT / "examples")
    pages.run(pages.parse(page, "bash", folder=tmp_path))


def test_few_blocks_are_skipped() -> None:
    skipped = [
        (page, reason)
        for page in pages.PAGES
        for reason in re.findall(r"^ *<!--- skip: next(.*?)-->", pages.read(page), re.M)
    ]
    assert all(re.fullmatch(r' "[^"]{8,}" ', reason) for _, reason in skipped), skipped
    assert len(skipped) <= SKIPPED


def test_the_rows_of_the_page_on_data_are_read() -> None:
    text = pages.read("docs/howto/data_formats.md")
    lines = re.findall(r"```json\n(.*?)\n```", text, flags=re.S)
    assert len(lines) >= 9
    for line in lines:
        method = "dpo" if '"chosen"' in line else "sft"
        columns = {"prompt": "ask", "completion": "reply"} if '"ask"' in line else None
        row = Row(json.loads(line), "page, line 1")
        assert Reader("page", method, columns, chat=True).read(row)

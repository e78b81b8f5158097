"""Every block of code in README and docs runs, or says why not; every command exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drlora_torch.finetune.data.files import Row
from drlora_torch.finetune.data.formats import Reader
from tests.docs import fragments, hub, pages

CODE = [
    page for page in pages.PAGES if re.search("```(python|pycon|json|yaml)\n", pages.read(page))
]
ELSEWHERE = {"README.md", "docs/adding_a_model.md"}
"""Pages whose one program has a test of its own (test_readme, torch/conventions)."""
SLOW = {
    "docs/ecosystem.md",
    "docs/howto/own_loop.md",
    "docs/howto/trainer_and_trl.md",
    "docs/quickstart.md",
}
FROM_HUB = {"docs/quantization.md"}  # pages that load models by their names on the Hub
SKIPPED = 17  # blocks that cannot run here, seven of them campaigns; lower it when there are fewer


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
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page in FROM_HUB:
        hub.use(request.getfixturevalue("cache"), monkeypatch)
    document = pages.parse(page, "python", "pycon", "json", "yaml")
    document.namespace.update(fragments.names_for(page, tmp_path))
    ran, reasons = pages.run(document)
    assert ran or reasons
    assert all(reasons)


def test_few_blocks_are_skipped() -> None:
    skipped = [
        (page, reason)
        for page in pages.PAGES
        for reason in re.findall(r"^ *<!--- skip: next(.*?)-->", pages.read(page), re.M)
    ]
    assert all(re.fullmatch(r' "[^"]{8,}" ', reason) for _, reason in skipped), skipped
    cannot_run = [each for each in skipped if not runs_elsewhere(each[1])]
    assert len(cannot_run) <= SKIPPED


def runs_elsewhere(reason: str) -> bool:
    """True if the reason is that another test, which names the reason, runs the block."""
    named = re.search(r'"((tests/\S+) runs it .*)"', reason)
    return named is not None and named[1] in (pages.ROOT / named[2]).read_text()


def test_the_rows_of_the_page_on_data_are_read() -> None:
    text = pages.read("docs/howto/data_formats.md")
    lines = re.findall(r"```json\n(.*?)\n```", text, flags=re.S)
    assert len(lines) >= 9
    for line in lines:
        method = "dpo" if '"chosen"' in line else "sft"
        columns = {"prompt": "ask", "completion": "reply"} if '"ask"' in line else None
        row = Row(json.loads(line), "page, line 1")
        assert Reader("page", method, columns, chat=True).read(row)

"""Every command in README and docs exists, and runs, or its block says why it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers.integrations import integration_utils
from transformers.trainer_callback import TrainerCallback

from drlora_torch.finetune import job
from tests.docs import commands, given, hub, pages, shell

SHELL = [page for page in pages.PAGES if "```bash\n" in pages.read(page)]
TESTED_ELSEWHERE = (
    "docs/after_training.md",
    "docs/distributed.md",
    "docs/examples.md",
    "docs/tutorial.md",
)
"""In tests/finetune/after, test_processes and tests/test_examples.py, and on README's page."""
MADE = {
    "README.md": ["my-run", "my-run/report.html"],
    "docs/distributed.md": ["my-run"],
    "docs/finetuning.md": ["runs/*"],
    "docs/howto/data_formats.md": ["runs/*"],
    "docs/quantization.md": ["runs/*"] * 3,
    "docs/quickstart.md": ["my-run", "my-run/report.html", "runs/*/report.html"],
    "docs/tutorial.md": ["my-run", "my-run/report.html"],
    "examples/recipes/README.md": ["my-run"],
}
"""What the commands of a page write."""


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


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, under the name that it got."""
    folder = tmp_path_factory.mktemp("runs")
    given.write_rows(folder / "my.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        hub.use(cache, patch)
        commands.run(f"drlora finetune {hub.OLMOE} my.jsonl --steps 6", folder, "")
    (made,) = (folder / "runs").iterdir()
    return made


def check_run(folder: Path) -> None:
    """A run ended, counted every step, and saved what it trained."""
    (result, *_) = json.loads((folder / "result.json").read_text())
    assert result["skipped_steps"] == 0
    assert result["loss_after"] > 0
    assert any((folder / "adapter").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the tutorial trains for 200 steps
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.exhaustive] if p in TESTED_ELSEWHERE else [])
        for p in SHELL
    ],
)
def test_the_commands_of_a_page_run(
    page: str, cache: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(cache, monkeypatch)
    given.write(page, tmp_path, cache, run)
    known = integration_utils.INTEGRATION_TO_CALLBACK  # TensorBoard need not be installed
    monkeypatch.setitem(known, "tensorboard", TrainerCallback)
    if page in commands.SHORTENED:  # a report takes seconds, and other pages have it
        monkeypatch.setattr(job, "write_report", lambda run: run.path / "report.html")
    pages.run(pages.parse(page, "bash", folder=tmp_path))
    for pattern in MADE.get(page, []):
        found = sorted(tmp_path.glob(pattern))
        assert len(found) == MADE[page].count(pattern), (pattern, found)
        for folder in found:
            if folder.is_dir():
                check_run(folder)

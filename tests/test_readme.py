"""What the README shows runs as it stands, and what CI installs is what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(arguments: list[str], folder: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_loop_of_the_readme_grows_ranks_to_the_budget(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    script = tmp_path / "loop.py"
    script.write_text(block)
    ranks = [int(rank) for rank in re.findall(r"\d+", run([str(script)], tmp_path))]
    assert len(ranks) == 16
    assert sum(ranks) == 16 * 4
    assert len(set(ranks)) > 1
    assert (tmp_path / "my-adapter" / "drlora_adapter.safetensors").is_file()


@pytest.mark.parametrize("name", ["01_custom_loop.py", "02_trainer.py"])
def test_the_examples_run_and_meet_their_budget(name: str, tmp_path: Path) -> None:
    printed = run([str(ROOT / "examples" / name)], tmp_path)
    layers = re.findall(r"^model\.layers\.\d+\.mlp\.experts \[(.*)\]$", printed, flags=re.M)
    assert layers
    for layer in layers:
        ranks = [int(rank) for rank in layer.split(",")]
        assert sum(ranks) == 4 * len(ranks)
        assert len(set(ranks)) > 1


def test_ci_installs_with_the_words_of_the_readme() -> None:
    (install,) = set(re.findall(r"^(pip install .*?) && ", README, flags=re.M))
    script = (ROOT / ".ci" / "run").read_text()
    assert install.replace("pip install", "pip install -q") in script


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []

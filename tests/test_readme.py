"""The README's code trains, its links exist, and its installation is what CI installs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = """
import json
figures = {
    "skipped": adapter.skipped_steps,
    "training": model.training,
    "ranks": [ranks.tolist() for ranks in adapter.ranks().values()],
}
print("figures", json.dumps(figures))
"""
"""Appended to the README's loop."""


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_of_the_readme_trains(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    script = tmp_path / "loop.py"
    script.write_text(block + REPORT, encoding="utf-8")
    printed = run([str(script)], tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, flags=re.M)]
    (line,) = re.findall(r"^figures (.*)$", printed, flags=re.M)
    figures: dict[str, Any] = json.loads(line)
    assert figures["training"]
    assert figures["skipped"] == 0
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    for ranks in figures["ranks"]:
        assert len(ranks) == 16
        assert sum(ranks) == 4 * 16
        assert max(ranks) > 4
    assert (tmp_path / "my-adapter" / "drlora_adapter.safetensors").is_file()


def test_it_is_short() -> None:
    assert README.count("\n") < 150


def test_ci_installs_with_the_words_of_the_readme() -> None:
    commands = re.findall(r"^(pip install .*?) && (\S+)", README, flags=re.M)
    assert {program for _, program in commands} == {"drlora", "pytest"}
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for install, _ in commands:
        assert install.replace("pip install", "pip install -q") in lines


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
    ],
)
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    missing = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if "://" not in link and not (target.exists() and anchor in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page, and the empty one."""
    if path.suffix != ".md":
        return {""}
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {"", *(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)}


def pinned(name: str) -> dict[str, str]:
    """The versions that a constraints file pins for this version of Python."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {
        each.name.replace("_", "-"): str(each.specifier).removeprefix("==")
        for each in found
        if each.marker is None or each.marker.evaluate()
    }


TOOLS = ("docs", "mutants")
"""Extras that only developers install."""


def lower_bounds() -> dict[str, str]:
    """The lower bounds of pyproject.toml; not of tools for lint, build and hooks, nor TOOLS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lists = [extras[name] for name in extras if name not in TOOLS] + [project["dependencies"]]
    bounds = {}
    for requirement in (Requirement(text) for one in lists for text in one):
        if requirement.name not in ("drlora", "build", "mypy", "pre-commit", "ruff"):
            bounds[requirement.name] = str(requirement.specifier).removeprefix(">=")
    return bounds


def test_the_oldest_versions_are_those_that_are_tested() -> None:
    oldest = pinned("constraints-oldest.txt")
    bounds = lower_bounds()
    assert bounds.pop("torch") == "2.10"  # tested on demand, see docs/known_violations.md
    assert set(bounds) <= set(oldest)
    wrong = {
        name: (bound, oldest[name])
        for name, bound in bounds.items()
        if Version(bound) != Version(oldest[name])
    }
    assert wrong == {}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    site = {Requirement(text).name for name in TOOLS for text in extras[name]}
    assert set(lower_bounds()) | site - {"drlora"} <= set(pinned("constraints.txt"))

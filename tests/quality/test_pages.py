"""The pages of the report: what is on them, where notes go, and what is refused."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.quality.claims import ALL_CLAIMS, CLAIMS
from benchmarks.quality.details import TITLES, detail_pages
from benchmarks.quality.errors import StudyError
from benchmarks.quality.notes import read_notes
from benchmarks.quality.page import main_page
from benchmarks.quality.report import write_report
from benchmarks.quality.runs import Results
from tests.quality import fake

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_without_runs_every_page_says_so() -> None:
    details = detail_pages(Results(), {}, None)
    assert [page.title for page in details] == list(TITLES)
    for page in details:
        assert "not run" in page.text.lower()
    text = main_page(Results(), {}, None, details, "results")
    assert text.count("| not run |") == len(ALL_CLAIMS)
    headings = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert headings == list(CLAIMS)


def test_the_page_links_every_detail_page(folder: Path) -> None:
    results = fake.results(folder, names=("uniform", "drlora"), tasks=("a",))
    details = detail_pages(results, {}, None)
    text = main_page(results, {}, None, details, "mine")
    assert [page.name for page in details if f"](mine/{page.name})" not in text] == []
    assert "model_embedded.md" in [page.name for page in details]


def test_notes_go_to_their_place_with_computed_figures(folder: Path) -> None:
    results = fake.results(folder, {"drlora": -0.4}, names=("uniform", "drlora"), noise=0.0)
    path = folder / "results_notes.md"
    assert read_notes(path, results) == {}
    path.write_text(
        "For people.\n\n## Summary\n\nIt wins {{ won('drlora') }} runs: {{ effect('drlora') }}.\n\n"
        "## Options\n\nWe keep them, at {{ match('drlora', 'embedded / a') }}.\n"
    )
    write_report(results, folder / "results.md")
    page = (folder / "results.md").read_text()
    assert "It wins 25 of 25 runs: -0.400 [-0.400, -0.400]." in page
    assert "For people" not in page
    assert "\n\nWe keep them, at " in (folder / "results" / "options.md").read_text()


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("## Default\n\nWe keep them.\n", r"no heading 'Default'; the report has Summary, "),
        ("## Summary\n\n{{ effect('unheard') }}\n", "no setting '' with both 'unheard' and"),
        ("## Summary\n\n{{ effect('drlora', where='b') }}\n", "no setting or model 'b'"),
        ("## Summary\n\n{{ gain('drlora') }}\n", "'gain' is undefined"),
        ("## Summary\n\n{{ effect( }}\n", "results_notes.md: "),
    ],
)
def test_notes_that_cannot_be_computed_are_refused(folder: Path, note: str, message: str) -> None:
    results = fake.results(folder, names=("uniform", "drlora"), tasks=("a",))
    (folder / "results_notes.md").write_text(note)
    with pytest.raises(StudyError, match=message):
        write_report(results, folder / "results.md")
    assert not (folder / "results.md").exists()
    assert not (folder / "results").exists()


@pytest.mark.slow
def test_the_command_writes_the_same_pages_twice_and_a_page_of_figures(folder: Path) -> None:
    from benchmarks.quality.__main__ import app

    runs = fake.study(tasks=("a",))
    path, page = fake.write(folder / "full.jsonl", runs), folder / "results.md"
    figures = folder / "figures.html"
    stale = folder / "results" / "old.md"
    stale.parent.mkdir()
    stale.write_text("a page of an earlier version")
    command = ["report", str(path), "--output", str(page)]
    done = CliRunner().invoke(app, [*command, "--html", str(figures)])
    assert done.exit_code == 0, done.output
    assert not stale.exists()
    first = pages_of(page)
    assert "| drlora | " in first["results/methods.md"]
    assert [name for name, text in first.items() if str(folder) in text] == []
    html = figures.read_text()
    assert html.count("plotly-graph-div") >= 5
    assert 'src="http' not in html
    assert CliRunner().invoke(app, command).exit_code == 0
    assert pages_of(page) == first


def pages_of(page: Path) -> dict[str, str]:
    """The main page and the details beside it, by their path."""
    paths = [page, *sorted(page.with_suffix("").glob("*.md"))]
    return {path.relative_to(page.parent).as_posix(): path.read_text() for path in paths}


def test_the_command_refuses_a_broken_file_in_a_line_and_leaves_the_page(folder: Path) -> None:
    from benchmarks.quality.__main__ import app

    page, path = folder / "results.md", folder / "full.jsonl"
    page.write_text("as it was")
    path.write_text('{"key": \n')
    done = CliRunner().invoke(app, ["report", str(path), "--output", str(page)])
    assert done.exit_code == 2
    assert "full.jsonl, line 1 is not a run" in done.output
    assert page.read_text() == "as it was"


@pytest.mark.slow
def test_the_pages_in_docs_are_what_the_committed_runs_give(tmp_path: Path) -> None:
    from benchmarks.quality.__main__ import app

    page = tmp_path / "results.md"
    notes = (ROOT / "docs" / "results_notes.md").read_text()
    (tmp_path / "results_notes.md").write_text(notes)
    tracked = ["git", "ls-files", "benchmarks/quality/results"]
    listed = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [str(ROOT / line) for line in listed.stdout.splitlines()]
    done = CliRunner().invoke(app, ["report", *files, "--output", str(page)])
    assert done.exit_code == 0, done.output
    assert pages_of(page) == pages_of(ROOT / "docs" / "results.md")


def test_figures_of_the_notes_are_computed() -> None:
    """No effect is typed: a sign and decimals stand in an expression, or not at all."""
    text = (ROOT / "docs" / "results_notes.md").read_text()
    prose = re.sub(r"\{\{.*?\}\}", "", text, flags=re.DOTALL)
    assert re.findall(r"[+-]\d\.\d{2,}", prose) == []
    assert "{{" in text


def test_figures_of_the_readme_are_those_of_the_page() -> None:
    section = (ROOT / "README.md").read_text().split("## Does it work?")[1].split("\n\n")[1]
    figures = set(re.findall(r"\d+(?:\.\d+)?(?: of \d+| %)", " ".join(section.split())))
    assert len(figures) == 11
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    missing = [figure for figure in figures if figure.removesuffix(" %") not in page]
    assert missing == []

"""The wheel holds the packages and their data alone; the source distribution tests itself."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDERS = {
    ".ci",
    "benchmarks",
    "docs",
    "drlora_core",
    "drlora_torch",
    "examples",
    "scripts",
    "tests",
}
PAGES = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "constraints.txt",
    "constraints-oldest.txt",
    "mkdocs.yml",
}
IN_WHEEL = {
    "drlora_core/py.typed",
    "drlora_core/templates/plotly/LICENSE",
    "drlora_core/templates/plotly/plotly-cartesian.min.js",
    "drlora_core/templates/report.css",
    "drlora_core/templates/report.html",
    "drlora_core/templates/report.js",
    "drlora_torch/py.typed",
    "drlora_torch/embedded/NOTICE",
    "drlora_torch/embedded/model/README.md",
    "drlora_torch/embedded/model/model.safetensors",
    "drlora_torch/embedded/model/tokenizer.json",
    "drlora_torch/embedded/task/train.jsonl",
}
LICENSES = {
    "LICENSE",
    "drlora_core/templates/plotly/LICENSE",
    "drlora_torch/embedded/NOTICE",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    pytest.importorskip("build")
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in FOLDERS:  # a copy: setuptools writes into the tree that it builds
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in PAGES | FILES:
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--outdir", str(output), str(tree)]
    if importlib.util.find_spec("setuptools") is not None and (
        Version(importlib.metadata.version("setuptools")) >= Version("77")
    ):
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return output


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 8 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names} - {"drlora_core", "drlora_torch"}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert names >= IN_WHEEL | {f"{info}/licenses/{name}" for name in LICENSES}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "drlora_torch").rglob("*.py")}
    assert names >= sources
    check_metadata(metadata)


def check_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT"
    assert set(metadata.get_all("License-File", [])) == LICENSES
    assert not any(field.startswith(("Author", "Maintainer")) for field in metadata)
    labels = {url.split(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert labels == {"Homepage", "Source", "Documentation", "Changelog", "Issues"}
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == ["numpy>=1.26", "pydantic>=2.7"]
    tools = ("pytest", "coverage", "mypy", "ruff", "build", "hypothesis")
    for line in metadata.get_all("Requires-Dist", []):
        assert not line.startswith(tools) or line.endswith('extra == "dev"')


@pytest.mark.slow
def test_the_source_distribution_tests_itself(built: Path, tmp_path: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert {path.name for path in tree.iterdir()} >= FOLDERS | PAGES | FILES
    for folder in FOLDERS:
        ours = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()}
        theirs = {p.relative_to(tree) for p in (tree / folder).rglob("*") if p.is_file()}
        assert {path for path in ours - theirs if "__pycache__" not in path.parts} == set()
    tests = ["tests/core/test_config.py", "tests/test_readme.py"]
    options = ["-q", "-p", "no:cacheprovider", "-n", "0", "-k", "not loop and not examples"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

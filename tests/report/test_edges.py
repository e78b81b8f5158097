"""Pages of runs where something is missing, and a server whose readers leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drlora_core import LayoutError
from drlora_core.report import page, serving, writing


def test_a_run_in_memory_has_no_place_for_its_report() -> None:
    run: Any = SimpleNamespace(path=None)
    with pytest.raises(LayoutError, match="say where to write its report"):
        writing._beside(run)


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "LIBRARIES", ("numpy", "no-such-library"))
    assert "numpy" in page._versions()
    assert "no-such-library" not in page._versions()


def test_a_file_that_vanishes_has_no_version(tmp_path: Path) -> None:
    before = serving.version_of(tmp_path)
    (tmp_path / "00000001.npz").symlink_to(tmp_path / "gone")
    assert len(serving.version_of(tmp_path)) == len(before)


def test_a_page_is_rendered_anew_only_if_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, rendered = serving.LivePage(tmp_path, pause=0.0), []

    def render(version: str) -> tuple[str, str]:
        rendered.append(version)
        return version, "page"

    monkeypatch.setattr(live, "_render", render)
    assert live.read() == live.read()
    assert len(rendered) == 1


@pytest.mark.parametrize(("error", "told"), [(ConnectionResetError, False), (KeyError, True)])
def test_a_browser_that_left_is_no_error(
    error: type[Exception], told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server = object.__new__(serving.PageServer)
    try:
        raise error
    except error:
        server.handle_error(None, ("127.0.0.1", 1))
    assert (error.__name__ in capsys.readouterr().err) is told

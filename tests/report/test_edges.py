"""Pages of runs where something is missing, and a server whose readers leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drlora_core import LayoutError
from drlora_core.report import figures, page, serving, writing


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


def test_within_the_pause_a_page_is_good_without_a_look_at_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looks = [100.0], []

    def look(*paths: Path) -> str:
        looks.append(paths)
        return str(len(looks))

    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(serving, "version_of", look)
    live = serving.LivePage(tmp_path, pause=5.0)
    monkeypatch.setattr(live, "_render", lambda version: (version, "page"))
    for now, version in {100.0: "1", 104.9: "1", 105.0: "2", 105.1: "2"}.items():
        clock[0] = now
        assert live.read() == (version, "page")
    assert looks == [(tmp_path,)] * 2


@pytest.mark.parametrize("layers", [figures.MOST_LAYERS, figures.MOST_LAYERS + 1])
def test_of_very_many_layers_those_that_differ_most_can_be_chosen(layers: int) -> None:
    """Long names that are cut alike have numbers."""
    names = [f"{'x' * 99}{number}{'y' * 99}" for number in range(layers)]
    final = np.zeros((layers, 2), dtype=np.int64)
    final[:, 1] = np.arange(1, layers + 1)  # the first differ least
    places = {name: slice(2 * row, 2 * row + 2) for row, name in enumerate(names)}
    run: Any = SimpleNamespace(layers=names, places=places, final=final.ravel())
    card = figures._by_layer("key", "title", "Text.", run, lambda run, name: name)
    drawn = list(card.variants.values())
    assert drawn == [names[-1], *names[layers - figures.MOST_LAYERS : -1]]
    assert next(iter(card.variants)).startswith("0: xxx")
    assert list(card.variants)[-1].startswith(f"{figures.MOST_LAYERS - 1}: xxx")
    few = f"Text. The {figures.MOST_LAYERS} layers of {layers} whose ranks differ most."
    assert card.text == (few if layers > figures.MOST_LAYERS else "Text.")


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

"""Cases that few runs meet: nothing to show, something in the way, a file that is half there."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import shutil
import sys
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from pydantic import BaseModel, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from drlora_core import (
    AllocatorConfig,
    GrowthEvent,
    LayoutError,
    atomic,
    errors,
    model_shape,
    notebook,
    testing,
)
from drlora_core.cli import app, common, main, tables
from drlora_core.plots.loss import MOST_POINTS, thin
from drlora_core.plots.style import MARKED_EVENTS, event_marks
from drlora_core.policies import AllocationRequest
from drlora_core.recording import writer
from drlora_core.recording.format import check_place, ends_at
from drlora_core.recording.traces import from_routing_trace, load_trace
from drlora_core.replay import first_difference
from drlora_core.runs import history, recipe
from drlora_core.runs.recipe import read_recipe
from drlora_core.state import dimension_importance, make_state
from drlora_core.validation import reword_errors
from tests.core import recorded

rank_map = importlib.import_module("drlora_core.plots.rank_map")  # functions have these names too
trajectories = importlib.import_module("drlora_core.plots.trajectories")


def test_single_dimensions_are_averaged_for_policies_that_cut_alone() -> None:
    config = AllocatorConfig()
    with pytest.raises(AssertionError, match="only policies that cut"):
        dimension_importance(make_state(config, {"a": np.ones(2, dtype=np.int64)}), config)


def grow_the_first(request: AllocationRequest) -> Any:
    growth = np.zeros_like(request.ranks)
    growth[0] = min(request.limits[0], request.quota)
    return growth


def test_a_policy_that_depends_on_the_numbering_is_found() -> None:
    request = testing.make_request(1, [1, 1], [1, 1])
    with pytest.raises(AssertionError, match="depends on the numbering"):
        testing._check_permuted(grow_the_first, request, np.array([1, 0]), [1, 0])


def event(**fields: Any) -> GrowthEvent:
    values: dict[str, Any] = {key: {} for key in ("deltas", "ranks", "saliency", "cut")}
    return GrowthEvent(**{"step": 2, "index": 1, "unplaced": 0, **values, **fields})


def test_events_that_leave_other_units_differ() -> None:
    found = first_difference((event(),), (event(unplaced=3),))
    assert found is not None
    assert "left 0 units" in found
    assert "left 3" in found
    assert first_difference((event(),), (dataclasses.replace(event()),)) is None


def test_what_is_empty_is_shown() -> None:
    assert errors.near_misses("a", []) == "there are none yet"
    assert notebook.layer_row("a", []) == ("a", 0, "-", "-", "-", 0)
    assert history._choose_steps(0, [], 5) == set()
    config = AllocatorConfig(policy="uniform", warmup_steps=5, growth_interval=10, growth_end=6)
    assert "0 growth events<" in config._repr_html_()


def test_many_points_are_thinned_and_many_events_are_a_span() -> None:
    steps = np.arange(10 * MOST_POINTS)
    thinned, values = thin(steps, steps / 2)
    assert (len(thinned), thinned[0], thinned[-1]) == (MOST_POINTS, 0, steps[-1])
    assert np.array_equal(values, thinned / 2)
    events: Any = SimpleNamespace(event_steps=list(range(3, 3 + 2 * MARKED_EVENTS)))
    (span,) = event_marks(events)
    assert (span["x0"], span["x1"]) == (3, 2 + 2 * MARKED_EVENTS)


def test_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LayoutError, match="is a file; choose another path"):
        check_place(tmp_path / "file" / "recording")


def test_a_recording_that_cannot_be_read_ends_nowhere(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", steps=3)
    header = json.loads((tmp_path / "run" / "recording.json").read_text())
    opened = {k: v for k, v in header.items() if k != "checksum"} | {"steps": None}
    (tmp_path / "run" / "recording.json").write_text(json.dumps(opened))
    assert ends_at(tmp_path / "run", 3)
    assert not ends_at(tmp_path / "run", 2)
    (tmp_path / "run" / "recording.json").write_text("{")
    assert not ends_at(tmp_path / "run", 3)
    assert not ends_at(tmp_path / "gone", 3)


def test_at_the_end_of_a_process_a_writer_that_is_gone_closes_nothing(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    written = writer.RecordingWriter(tmp_path / "run", engine)
    engine.record_to(written)
    recorded.drive(engine, 3)
    engine.state_dict()  # which writes the steps
    at_exit = weakref.ref(written)
    writer._close(at_exit)
    assert json.loads((tmp_path / "run" / "recording.json").read_text())["steps"] == 3
    engine.record_to(None)
    del written
    assert at_exit() is None
    shutil.rmtree(tmp_path / "run")
    writer._close(at_exit)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_has_a_name_for_each_layer_and_a_known_format(tmp_path: Path) -> None:
    sums = np.ones((2, 1, 3))
    with pytest.raises(LayoutError, match="2 layer names for 1 layers"):
        from_routing_trace(sums, np.array([4, 4]), layer_names=["a", "b"])
    made = io.BytesIO()
    np.save(made, sums)
    with zipfile.ZipFile(tmp_path / "trace.npz", "w") as archive:
        for name in ("weight_sum", "tokens"):
            archive.writestr(f"{name}.npy", made.getvalue().replace(b"NUMPY\x01", b"NUMPY\x09", 1))
    with pytest.raises(LayoutError, match=r"version \(9, 0\) of the NumPy format"):
        load_trace(tmp_path / "trace.npz")


def test_a_recipe_that_is_no_yaml_has_a_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: [")
    found = read_recipe(path)
    assert found is not None
    assert (found.text, found.options) == ("a: [", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * (recipe.MOST_BYTES + 1), "it has 65,537 characters; accepted: at most 65,536"),
        ("a: &a [1]\nb: *a", "repeats a part by an alias"),
        ("a: " + "[" * 21 + "]" * 21, "nested more than 20 deep"),
    ],
)
def test_a_yaml_text_that_takes_long_to_read_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    yaml = pytest.importorskip("yaml")
    with pytest.raises(ValueError, match=message):
        recipe.check_yaml(yaml, text)
    (tmp_path / "recipe.yaml").write_text(text)
    found = read_recipe(tmp_path / "recipe.yaml")
    assert found is None or found.options == {}
    recipe.check_yaml(yaml, "a: " + "[" * 19 + "]" * 19)


def test_a_terminal_gets_a_table_as_it_is() -> None:
    console, made = Console(file=io.StringIO(), force_terminal=True), Table("a")
    tables._print_stripped(made, console)
    assert console.file.getvalue().strip()  # type: ignore[attr-defined]


def test_the_command_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert 'pip install "drlora[cli]"' in capsys.readouterr().err


def test_a_folder_that_was_missing_is_missing_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic.replaced_files(tmp_path / "a" / "b") as part:
            (part / "file").touch()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.DRLoRAError, match="is a file, so that"):
        common.check_output(tmp_path / "file" / "out")


def test_an_interruption_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**_: Any) -> int:
        raise typer.Abort

    monkeypatch.setattr(app, "build", lambda: (interrupt, []))
    with pytest.raises(SystemExit) as ended:
        app.run(["plan"])
    assert ended.value.code == app.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_an_answer_that_varies_is_refused() -> None:
    calls: list[int] = []

    def vary(request: AllocationRequest) -> Any:
        calls.append(1)
        growth = np.zeros_like(request.ranks)
        growth[0] = min(request.limits[0], request.quota, len(calls) % 2)
        return growth

    with pytest.raises(AssertionError, match="is not deterministic"):
        testing._check_once(vary, testing.make_request(quota=3, ranks=[1], limits=[2]))


def test_an_error_of_the_check_is_not_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(draw: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(testing, "_draw_request", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        testing.check_policy(grow_the_first)


class Chosen(BaseModel):
    """A configuration with lists."""

    names: Annotated[list[str], Field(min_length=1)] = ["a"]
    pair: Annotated[list[int], Field(min_length=2)] = [1, 2]
    _reword_errors = model_validator(mode="wrap")(reword_errors)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": []}, r"must name at least one, got \[\]"),
        ({"pair": [7]}, r"must name at least 2, got \[7\]"),
    ],
)
def test_a_list_that_is_too_short_says_how_many_are_needed(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Chosen(**given)


def test_a_list_of_a_model_is_a_list() -> None:
    assert model_shape._list(Path("c"), {}, "layers") == []
    with pytest.raises(LayoutError, match="layers is 3; accepted: a list"):
        model_shape._list(Path("c"), {"layers": 3}, "layers")


def test_a_folder_that_may_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(errors.DRLoRAError, match="cannot be written to"):
        common.check_output(tmp_path / "out")


def test_without_signals_a_point_tells_its_rank_alone() -> None:
    run: Any = SimpleNamespace(history=SimpleNamespace(steps=[]))
    for found in (trajectories._hover(run, "a", 0, []), rank_map._hover(run, 0, True)):
        assert list(found) == ["hovertemplate"]
        assert "rank" in found["hovertemplate"]

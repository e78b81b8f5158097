"""From results files to comparable cells: pairing, learning rates, bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.records import RunRecord
from benchmarks.quality.runs import Results, differences, exact_match, read
from tests.quality import fake


def sorted_runs(tmp_path: Path, runs: list[RunRecord], name: str = "full.jsonl") -> Results:
    return read([fake.write(tmp_path / name, runs)])


def test_differences_are_paired_by_seed_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    losses = {("uniform", 0): 1.0, ("uniform", 1): 2.0, ("drlora", 1): 1.5, ("drlora", 0): 0.9}
    runs = [fake.record(method, loss, seed=seed) for (method, seed), loss in losses.items()]
    runs.append(fake.record("drlora", 9.0, seed=7))  # uniform has no such seed
    results = sorted_runs(tmp_path, runs)
    (group,) = results.groups("drlora", "uniform").values()
    assert group == pytest.approx([-0.1, -0.5])
    (group,) = results.groups("drlora", "uniform", exact_match).values()
    assert group == pytest.approx([5.0, 25.0])


def test_the_rate_is_chosen_on_validation_and_tuning_seeds_only(tmp_path: Path) -> None:
    runs = [
        fake.record("drlora", validation, seed=seed, rate=rate, test_loss=test)
        for rate, validation, test in ((0.1, 1.0, 5.0), (0.2, 2.0, 1.0), (0.3, 1.5, 0.1))
        for seed in (0, 1)
    ]
    runs += [fake.record("drlora", 99.0, seed=seed, rate=0.1, test_loss=7.0) for seed in (2, 3)]
    ((cell,),) = [list(by.values()) for by in sorted_runs(tmp_path, runs).cells.values()]
    assert cell.tuning_seeds == (0, 1)
    assert cell.rate == 0.1
    assert cell.at_edge
    assert [record.test_loss for record in cell.chosen().values()] == [5.0, 5.0, 7.0, 7.0]


def test_methods_are_compared_on_the_rates_that_both_tried(tmp_path: Path) -> None:
    runs = [fake.record("drlora", loss, rate=rate) for rate, loss in ((0.1, 1.0), (0.2, 0.5))]
    runs.append(fake.record("gamma_2", 0.9, rate=0.1))
    ((cells),) = sorted_runs(tmp_path, runs).cells.values()
    assert cells["drlora"].rate == 0.2
    assert differences(cells["gamma_2"], cells["drlora"]) == pytest.approx([-0.1])


def test_runs_that_diverged_are_counted_and_left_out(tmp_path: Path) -> None:
    runs = [fake.record("drlora", 1.0, seed=0), fake.record("drlora", 1e6, seed=1, diverged=True)]
    ((cells),) = sorted_runs(tmp_path, runs).cells.values()
    assert list(cells["drlora"].chosen()) == [0]
    assert cells["drlora"].diverged() == 1


def test_a_refused_method_has_no_figures(tmp_path: Path) -> None:
    ((cells),) = sorted_runs(tmp_path, [fake.record("prune", 0.0, refused="cannot")]).cells.values()
    assert cells["prune"].refused == "cannot"
    assert cells["prune"].chosen() == {}
    assert cells["prune"].values(exact_match).size == 0


def test_what_a_method_changes_in_training_does_not_part_it_from_the_others(
    tmp_path: Path,
) -> None:
    runs = [fake.record("drlora", 1.0), fake.record("events_2", 1.5)]
    ((cells),) = sorted_runs(tmp_path, runs).cells.values()
    assert differences(cells["events_2"], cells["drlora"]) == pytest.approx([0.5])


def test_other_training_is_another_setting_and_a_repeated_run_counts_once(tmp_path: Path) -> None:
    first = fake.record("drlora", 1.0)
    longer = fake.TRAINING.model_copy(update={"steps": 200})
    second = first.model_copy(update={"spec": first.spec.model_copy(update={"training": longer})})
    results = sorted_runs(tmp_path, [first, first, second])
    assert len(results.settings()) == 2
    assert len(results.records) == 2
    labels = [results.label(setting) for setting in results.settings()]
    assert labels == ["embedded / codes", "embedded / codes, steps 200"]


def test_a_model_and_task_counts_once_by_the_training_with_most_runs(tmp_path: Path) -> None:
    short = [fake.record("drlora", 1.0, seed=seed) for seed in range(2)]
    longer = fake.TRAINING.model_copy(update={"steps": 200})
    long = [
        fake.record("drlora", 1.0, seed=seed).model_copy(
            update={"spec": short[0].spec.model_copy(update={"training": longer, "seed": seed})}
        )
        for seed in range(3)
    ]
    (setting,) = sorted_runs(tmp_path, [*short, *long]).primary()
    assert setting.training.steps == 200


def test_held_out_are_its_tasks_and_files(tmp_path: Path) -> None:
    known = fake.write(tmp_path / "full.jsonl", [fake.record("drlora", 1.0, task="codes")])
    task = fake.write(tmp_path / "more.jsonl", [fake.record("drlora", 1.0, task="cipher")])
    seeds = fake.write(tmp_path / "heldout_seeds.jsonl", [fake.record("drlora", 1.0, task="codes")])
    results = read([known, task, seeds])
    assert [s.task for s in results.settings(held_out=True)] == ["cipher", "codes"]
    assert [s.task for s in results.settings(held_out=False)] == ["codes"]


def test_labels_hold_no_path(tmp_path: Path) -> None:
    run = fake.record("drlora", 1.0, task="/home/me/gsm8k_train.jsonl,/home/me/gsm8k_test.jsonl")
    (setting,) = sorted_runs(tmp_path, [run]).settings()
    assert setting.name == "embedded / gsm8k_train"


def test_two_methods_of_one_name_are_refused(tmp_path: Path) -> None:
    run = fake.record("drlora", 1.0)
    other = run.spec.method.model_copy(update={"config": {"gamma": 0.5}})
    changed = run.model_copy(update={"spec": run.spec.model_copy(update={"method": other})})
    with pytest.raises(ValueError, match=r"two methods are called 'drlora' in embedded / codes"):
        sorted_runs(tmp_path, [run, changed])


def test_broken_files_are_named_with_line_and_reason(tmp_path: Path) -> None:
    line = fake.record("drlora", 1.0).model_dump_json()
    for second, reason in (
        (line[:-9], "line 2"),
        (line.replace('"seconds"', '"duration"'), "line 2.*(seconds|duration)"),
        ("", "line 2"),
    ):
        path = tmp_path / "broken.jsonl"
        path.write_text(f"{line}\n{second}\n")
        with pytest.raises(ValueError, match=rf"broken\.jsonl, {reason}"):
            read([path])
    path.write_text(f"{line}\n{line[:40]}")
    with pytest.raises(ValueError, match=r"broken\.jsonl: the last line is cut off"):
        read([path])
    with pytest.raises(ValueError, match="no results file"):
        read([tmp_path / "none.jsonl"])


def test_numbers_come_out_as_arrays(tmp_path: Path) -> None:
    ((cells),) = sorted_runs(tmp_path, [fake.record("drlora", 1.0)]).cells.values()
    assert cells["drlora"].values(exact_match).dtype == np.float64

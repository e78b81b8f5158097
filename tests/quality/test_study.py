"""A study: which runs it has, in which order, which are skipped, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.quality import results_file, study
from benchmarks.quality.allocation import allocator_config, training_of
from benchmarks.quality.errors import StudyError
from benchmarks.quality.expansion import best_rates, report_runs, size, tuning_runs
from benchmarks.quality.methods import METHODS
from benchmarks.quality.models import SHIPPED
from benchmarks.quality.policies import POLICIES
from benchmarks.quality.records import Method, RunRecord, RunSpec
from benchmarks.quality.runner import check, conduct
from benchmarks.quality.study import Study
from drlora_core import AllocatorConfig
from drlora_core.testing import check_policy
from tests.quality.studies import TINY, make_record, make_spec, make_study

PROFILES = sorted(path.stem for path in study.PROFILES.glob("*.toml"))


class Executor:
    """Counts runs instead of training."""

    def __init__(self, fails: tuple[str, ...] = (), stop_after: int | None = None) -> None:
        self.specs: list[RunSpec] = []
        self.fails, self.stop_after = fails, stop_after

    def __call__(self, spec: RunSpec) -> RunRecord:
        if len(self.specs) == self.stop_after:
            raise KeyboardInterrupt
        self.specs.append(spec)
        if spec.method.name in self.fails:
            raise RuntimeError("no such luck")
        return make_record(spec)


def do(what: Study, output: Path, execute: Executor, *reuse: Path) -> tuple[list[str], str]:
    """Carry out a study; return the failures and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    failures = conduct(what, output, 1, console, execute, reuse)
    assert isinstance(console.file, io.StringIO)
    return [failure.reason for failure in failures], console.file.getvalue()


# -- expansion -----------------------------------------------------------------------------------


def test_every_rate_runs_on_the_tuning_seeds_and_the_best_on_all() -> None:
    small = make_study()
    tuning = tuning_runs(small)
    assert len(tuning) == 2 * 2 * 2
    assert {spec.seed for spec in tuning} == {0}
    report = report_runs(small, [make_record(spec) for spec in tuning])
    assert len(report) == 3 * 2 * 2
    assert {spec.learning_rate for spec in report} == {0.001}
    keys = {spec.key for spec in (*tuning, *report)}
    assert len(keys) == size(small) == 16  # of the report, seed 0 was trained while tuning


def test_seeds_are_outermost() -> None:
    small = make_study(tuning_seeds=(0, 1))
    tuning = tuning_runs(small)
    report = report_runs(small, [make_record(spec) for spec in tuning])
    assert [spec.seed for spec in tuning] == [0] * 8 + [1] * 8
    assert [spec.seed for spec in report] == [0] * 4 + [1] * 4 + [2] * 4
    assert [spec.task for spec in report[:4]] == ["codes", "codes", "strings", "strings"]


def test_the_rate_is_chosen_by_mean_validation_loss_and_not_by_the_test() -> None:
    small = make_study(tasks=("codes",), methods=("drlora",), tuning_seeds=(0, 1))
    losses = {(0.01, 0): 1.0, (0.01, 1): 2.0, (0.001, 0): 0.5, (0.001, 1): 3.0}
    records = [
        make_record(
            spec,
            validation_loss=losses[spec.learning_rate, spec.seed],
            test_loss=spec.learning_rate,  # would say 0.001
        )
        for spec in tuning_runs(small)
    ]
    assert best_rates(small, records) == {("embedded", "codes", "drlora"): 0.01}
    assert best_rates(small, records[:3]) == {("embedded", "codes", "drlora"): 0.01}
    assert best_rates(small, records[:1]) == {}  # no rate has both seeds


def test_refused_methods_run_no_further() -> None:
    small = make_study()
    records = [
        make_record(spec, refused="no" if spec.method.name == "uniform" else None)
        for spec in tuning_runs(small)
    ]
    assert {spec.method.name for spec in report_runs(small, records)} == {"drlora"}


def test_keys_do_not_change() -> None:
    """Results files would no longer be resumed: a new field of a specification costs all runs."""
    assert make_spec().key == "b95104c6a08a2c5d"
    assert make_spec(seed=1).key != make_spec().key


# -- allocation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [16, 50, 150, 240, 1001])
def test_exactly_the_events_fit(steps: int) -> None:
    shared = TINY.model_copy(update={"steps": steps})
    config = allocator_config(METHODS["drlora"], shared, seed=3)
    assert config.num_events == 8
    assert round(0.1 * steps) < config.growth_steps[0]
    assert config.growth_steps[-1] <= round(0.6 * steps)
    assert config.max_growth == 1  # 8 events from rank 1 to 8
    assert config.seed == 3


def test_too_few_steps_for_the_events() -> None:
    shared = TINY.model_copy(update={"steps": 12})
    with pytest.raises(StudyError, match="8 growth events do not fit between 10% and 60% of 12"):
        allocator_config(METHODS["drlora"], shared, seed=0)


def test_methods_start_where_they_should() -> None:
    prune = allocator_config(METHODS["prune"], TINY, seed=0)
    assert (prune.r_init, prune.r_target, prune.max_growth) == (4, 2, None)
    assert allocator_config(METHODS["r_max_everywhere"], TINY, seed=0).r_target == 8
    assert allocator_config(METHODS["static_profile"], TINY, seed=0).growth_steps == (1,)
    gamma = Method(name="gamma0", config={"gamma": 0.0, "max_growth": 3})
    assert allocator_config(gamma, TINY, seed=0).max_growth == 3


def test_early_growth_is_what_the_library_offers_under_that_name() -> None:
    shared = TINY.model_copy(update={"steps": 240})
    method = METHODS["early"]
    ours = allocator_config(method, training_of(method, shared), seed=0)
    assert ours == AllocatorConfig.for_training(
        240, timetable="early", events=8, r_init=1, r_target=2, r_max=8
    )
    late = allocator_config(METHODS["drlora"], shared, seed=0)
    assert late == AllocatorConfig.for_training(
        240, timetable="late", events=8, r_init=1, r_target=2, r_max=8
    )


def test_a_method_may_change_what_costs_nothing_and_nothing_else() -> None:
    few = Method(name="few", training={"events": 2})
    assert allocator_config(few, training_of(few, TINY), seed=0).num_events == 2
    with pytest.raises(ValueError, match="'steps' must be the same for all methods"):
        Method(name="longer", training={"steps": 1000})


def test_impossible_configurations_are_named() -> None:
    wrong = Method(name="wrong", config={"r_init": 3})
    with pytest.raises(StudyError, match=r"method 'wrong'.*r_init 3 > r_target 2"):
        allocator_config(wrong, TINY, seed=0)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_the_contract(name: str) -> None:
    # Their own signals may tie where f * g differs, and then the index decides.
    check_policy(POLICIES[name], equivariant=False, examples=40)


# -- results file --------------------------------------------------------------------------------


def test_finished_runs_are_skipped(tmp_path: Path) -> None:
    output = tmp_path / "results" / "tiny.jsonl"
    first = Executor()
    assert do(make_study(), output, first)[0] == []
    assert len(first.specs) == 16
    again = Executor()
    do(make_study(), output, again)
    assert again.specs == []
    more = Executor()
    do(make_study(seeds=(0, 1, 2, 3)), output, more)
    assert [spec.seed for spec in more.specs] == [3] * 4
    assert len(results_file.read(output)) == 20


def test_runs_of_another_file_count_where_they_are_the_same(tmp_path: Path) -> None:
    other, output = tmp_path / "other.jsonl", tmp_path / "tiny.jsonl"
    do(make_study(methods=("uniform",)), other, Executor())
    kept = other.read_bytes()
    execute = Executor()
    printed = do(make_study(), output, execute, other)[1]
    assert {spec.method.name for spec in execute.specs} == {"drlora"}
    assert len(execute.specs) == 8
    assert {record.spec.method.name for record in results_file.read(output)} == {"drlora"}
    assert other.read_bytes() == kept
    assert "uniform" in printed  # budgets are those of the whole study
    longer = Executor()  # of another training, nothing is the same
    do(make_study(training=TINY.model_copy(update={"steps": 17})), tmp_path / "b", longer, other)
    assert len(longer.specs) == 16


def test_a_stopped_study_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "tiny.jsonl"
    with pytest.raises(KeyboardInterrupt):
        do(make_study(), output, Executor(stop_after=5))
    whole = output.read_bytes()
    output.write_bytes(whole[:-40])  # the fifth line was being written
    rest = Executor()
    printed = do(make_study(), output, rest)[1]
    assert "removed a cut-off last line" in printed
    assert len(rest.specs) == 12
    assert output.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, -1) + 1])
    assert len({record.key for record in results_file.read(output)}) == 16


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    output = tmp_path / "tiny.jsonl"
    output.write_text('{"key": 1}\n')
    with pytest.raises(StudyError, match=r"tiny\.jsonl, line 1 is not a run"):
        do(make_study(), output, Executor())


def test_a_failing_method_does_not_stop_the_others(tmp_path: Path) -> None:
    output = tmp_path / "tiny.jsonl"
    execute = Executor(fails=("uniform",))
    failures, printed = do(make_study(), output, execute)
    assert failures == ["RuntimeError: no such luck"] * 4
    assert "failed: embedded / codes / uniform at 0.01, seed 0" in printed
    assert {record.spec.method.name for record in results_file.read(output)} == {"drlora"}
    assert len(execute.specs) == 4 + 8  # failed once each, and not again in the second stage


def test_budgets_are_printed(tmp_path: Path) -> None:
    printed = do(make_study(), tmp_path / "tiny.jsonl", Executor())[1]
    assert "drlora" in printed
    assert "128" in printed


# -- files and names -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_can_be_run(name: str) -> None:
    profile = study.load(study.find_profile(name))
    assert profile.name == name
    assert f"{size(profile)} runs" in profile.description
    assert set(profile.tuning_seeds) <= set(profile.seeds)
    local = [task for task in profile.tasks if not task.endswith(".jsonl")]
    assert all(model in SHIPPED or "/" in model for model in profile.models)
    check(profile.model_copy(update={"tasks": tuple(local), "models": ("embedded",)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("drlor",)}, "no method 'drlor'; did you mean 'drlora'"),
        ({"methods": ("drlora", "drlora")}, "two methods are named 'drlora'"),
        ({"methods": ({"name": "x", "config": {}, "confg": {}},)}, "confg"),
        ({"model": ("embedded",)}, "model"),
    ],
)
def test_mistakes_in_a_study_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_study(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("cods",)}, "no task 'cods'"),
        ({"models": ("embeded",)}, "no model 'embeded'.*did you mean 'embedded'"),
        ({"methods": ({"name": "x", "kind": "peft_lra"},)}, "did you mean 'peft_lora'"),
        ({"methods": ({"name": "x", "policy": "per_tokn"},)}, "did you mean 'per_token'"),
        ({"methods": ({"name": "x", "config": {"gama": 1.0}},)}, "gama"),
    ],
)
def test_mistakes_are_found_before_the_first_run(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    execute = Executor()
    with pytest.raises(ValueError, match=message):
        do(make_study(**changes), tmp_path / "tiny.jsonl", execute)
    assert execute.specs == []


def test_unknown_profiles_have_near_misses(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no profile 'smok'.*did you mean 'smoke'"):
        study.find_profile("smok")
    broken = tmp_path / "study.toml"
    broken.write_text("name = ")
    with pytest.raises(StudyError, match=r"study\.toml"):
        study.load(study.find_profile(str(broken)))

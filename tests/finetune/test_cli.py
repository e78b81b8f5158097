"""The command line of the main job: bad input is one clear sentence and loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drlora_core.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
QUICK = ["--steps", "4", "--batch-size", "8", "--r-init", "1", "--r-target", "2", "--r-max", "4"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail; return its sentence."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code not in (0, None)
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    assert said.startswith("drlora: ")
    assert "\n" not in said
    return said


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_folder_and_a_file_of_the_users_are_enough(
    moe_folder: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", str(moe_folder), str(sums), "--output", str(output), *QUICK])
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "held-out loss after" in said
    assert "32 / 32" in said
    assert (output / "adapter" / "drlora_adapter.safetensors").is_file()


@pytest.mark.parametrize("text", ["one\n\ntwo words\n\nthree\n\nfour"])
def test_plain_text_is_accepted(moe_folder: Path, tmp_path: Path, text: str) -> None:
    data = write(tmp_path / "prose.txt", text)
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", str(moe_folder), str(data), "--output", str(output), *QUICK])
    assert not stopped.value.code
    assert json.loads((output / "result.json").read_text())[0]["total_rank"] == 32


def test_a_model_without_experts_is_refused(
    dense_folder: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    said = refused(["finetune", str(dense_folder), str(sums), "--output", str(output)], capsys)
    assert "LlamaForCausalLM has no mixture-of-experts layer" in said
    assert not output.exists()


def test_an_existing_output_folder_is_left_alone(
    moe_folder: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = write(tmp_path / "precious.txt", "mine")
    said = refused(
        ["finetune", str(moe_folder), str(sums), "--output", str(tmp_path), *QUICK], capsys
    )
    assert "exists" in said
    assert "--resume" in said
    assert precious.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [precious]


def test_resume_needs_an_unfinished_run_and_no_other_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no run.yaml" in refused(["finetune", "--resume", str(tmp_path)], capsys)
    said = refused(["finetune", "--resume", str(tmp_path), "--r-max", "3"], capsys)
    assert "leave out --r-max" in said
    said = refused(["finetune", "--resume", str(tmp_path), "--compare", "uniform"], capsys)
    assert "leave out --compare" in said


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_no_half_adapter(
    moe_folder: Path, sums: Path, tmp_path: Path
) -> None:
    """A real limit on file size, in a process of its own, stands for the full disk."""
    output = tmp_path / "run"
    script = (
        "import resource, sys\n"
        "from drlora_torch.finetune import trainers, folder\n"
        "real = trainers.SFT.save_model\n"
        "def limited(self, *args, **kwargs):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    real(self, *args, **kwargs)\n"
        "trainers.SFT.save_model = limited\n"
        "from drlora_core.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["finetune", str(moe_folder), str(sums), "--output", str(output), *QUICK]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    sentence = [line for line in ended.stderr.splitlines() if line.startswith("drlora: ")]
    assert len(sentence) == 1
    assert "Traceback" not in ended.stderr
    left = [
        path.name for path in output.rglob("*") if "adapter" in path.name or ".part" in path.name
    ]
    assert left == []


def test_inspect_lists_layers(moe_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(moe_folder), "--json"])
    assert not stopped.value.code
    layers = json.loads(capsys.readouterr().out)
    assert [layer["num_experts"] for layer in layers] == [8, 8]
    assert all(layer["obstacle"] is None for layer in layers)
    assert layers[0]["router"] == "model.layers.0.mlp.gate"

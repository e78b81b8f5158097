"""The examples for several processes: the loop trains, and the other files can be read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from drlora_torch.finetune.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_loop_trains_in_two_processes() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / "04_torchrun.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^step .* loss (\S+)", done.stdout, flags=re.M)]
    assert len(losses) == 6  # the second process prints nothing
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    layers = re.findall(r"^model\.layers\.\d+\.mlp\.experts \[(.*)\]$", done.stdout, flags=re.M)
    assert len(layers) == 2
    for layer in layers:
        ranks = [int(rank) for rank in layer.split(",")]
        assert sum(ranks) == 4 * len(ranks)
        assert len(set(ranks)) > 1


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_its_configurations(name: str, kind: str) -> None:
    path = EXAMPLES / f"accelerate_{name}.yaml"
    config = ClusterConfig.from_yaml_file(path)  # refuses unknown keys
    assert config.distributed_type.value == kind
    parser = launch_command_parser()
    options = {word.lstrip("-") for action in parser._actions for word in action.option_strings}
    assert set(config.fsdp_config) <= options
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)


def test_the_slurm_script_is_bash_and_gives_options_that_exist() -> None:
    path = EXAMPLES / "slurm.sbatch"
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    subprocess.run([bash, "-n", str(path)], check=True)
    given = re.findall(r"ARGUMENTS=\((.*)\)", path.read_text())
    assert len(given) == 2
    options = {word for line in given for word in re.findall(r"--([a-z-]+)", line)}
    assert {"resume", "output"} < options
    fields = {name.replace("_", "-") for name in Recipe.model_fields}
    assert options - {"resume", "output"} <= fields

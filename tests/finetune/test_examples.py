"""The configurations for several processes can be read; tests/test_examples.py runs the loop."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from drlora_torch.finetune.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


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

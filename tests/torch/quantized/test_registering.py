"""``import drlora_torch`` imports little, and then ``from_pretrained`` reads packed experts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drlora_torch
from tests.marks import slow_and_thinned
from tests.torch import helpers, models

LIGHT = """
import sys
import drlora_torch
heavy = {"torch", "transformers", "bitsandbytes", "accelerate", "peft"} & sys.modules.keys()
assert not heavy, heavy
"""
ORDERS = {
    "drlora first": """
import drlora_torch
from transformers import AutoModelForCausalLM
""",
    "transformers first": """
from transformers import AutoModelForCausalLM
import drlora_torch
""",
    "quantizers of transformers first": """
import transformers.quantizers.auto
import drlora_torch
from transformers import AutoModelForCausalLM
""",
    "our configuration first": """
import drlora_torch
drlora_torch.Experts4bitConfig()
from transformers import AutoModelForCausalLM
""",
    "another of our quantizers first": """
import drlora_torch
drlora_torch.packed_config
from transformers import AutoModelForCausalLM
""",
    "quantizing in memory first": """
import drlora_torch
drlora_torch.quantize_experts
from transformers import AutoModelForCausalLM
""",
}
READ = """
import sys
import torch
torch.set_num_threads(1)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
torch.save(model.state_dict(), folder + "/state.pt")
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
assert sum(name.startswith("drlora_") for name in known) == 3, list(known)
"""


def run(source: str, *arguments: str) -> None:
    """Run a program in a fresh interpreter, which must not fail."""
    command = [sys.executable, "-W", "ignore", "-c", source, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_framework() -> None:
    run(LIGHT)


@pytest.mark.parametrize("order", slow_and_thinned((order,) for order in ORDERS))
def test_packed_checkpoints_are_read_after_an_import(order: str, tmp_path: Path) -> None:
    model = models.build()
    drlora_torch.quantize_experts(model)
    model.save_pretrained(tmp_path)
    run(ORDERS[order] + READ, str(tmp_path))
    found = torch.load(tmp_path / "state.pt")
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(helpers.equal(found[name], value) for name, value in wanted.items())

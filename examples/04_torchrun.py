"""Dynamic ranks in several processes. Takes half a minute on two cores.

    torchrun --nproc-per-node 2 examples/04_torchrun.py

Only the order is specific to drlora: ``attach`` first, then ``DistributedDataParallel``, which
synchronizes the parameters that it finds. Every process trains on its own rows, and all take the
decisions that one process with all the rows would take.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine

STEPS, ROWS = 60, 16  # rows of all processes together


def make_model() -> OlmoeForCausalLM:
    """Build a small MoE model, with the same weights in every process."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return OlmoeForCausalLM(config)


def make_batch(generator: torch.Generator) -> torch.Tensor:
    """Make this process's share of the rows: sequences that count upwards from a random start."""
    start = torch.randint(0, 64, (ROWS, 1), generator=generator)
    tokens = (start + torch.arange(24)) % 64
    return tokens[dist.get_rank() :: dist.get_world_size()]


def train(device: torch.device) -> None:
    model = make_model().to(device)
    config = AllocatorConfig.for_training(STEPS, r_target=4, r_max=12)
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        tokens = make_batch(generator).to(device)
        loss = parallel(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            loss = loss.detach()
            dist.all_reduce(loss)
            if dist.get_rank() == 0:
                mean = loss.item() / dist.get_world_size()
                total = sum(int(ranks.sum()) for ranks in adapter.ranks().values())
                print(f"step {step:3d}  loss {mean:.3f}  total rank {total}")

    if dist.get_rank() == 0:  # all processes have the same ranks and weights
        for name, ranks in adapter.ranks().items():
            print(name, ranks.tolist())
        print("skipped steps:", adapter.skipped_steps)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

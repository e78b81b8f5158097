"""Dynamic ranks in your own training loop. Takes half a minute on two cores.

Only three lines are specific to drlora: the engine, ``attach``, and the optimizer's parameters.
drlora hooks into ``optimizer.step()`` to update its statistics and grow ranks.
"""

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine

STEPS = 60


def make_model() -> OlmoeForCausalLM:
    """Build a small MoE model.

    In practice, use ``from_pretrained``, then ``model.train()``: it returns evaluation mode.
    """
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


def make_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make sequences that count upwards from a random start."""
    start = torch.randint(0, 64, (16, 1), generator=generator)
    tokens = (start + torch.arange(24)) % 64
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def main() -> None:
    model = make_model()
    config = AllocatorConfig.for_training(STEPS, r_target=4, r_max=12)
    engine = AllocatorEngine(config)
    adapter = drlora_torch.attach(model, engine)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        loss = model(**make_batch(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            total = sum(int(ranks.sum()) for ranks in adapter.ranks().values())
            print(f"step {step:3d}  loss {loss.item():.3f}  total rank {total}")

    for name, ranks in adapter.ranks().items():
        print(name, ranks.tolist())
    print("skipped steps:", adapter.skipped_steps)


if __name__ == "__main__":
    main()

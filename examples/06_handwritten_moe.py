"""Dynamic ranks for an MoE block written in plain PyTorch. Takes a few seconds.

One call of ``register_moe`` declares the block class. drlora checks the declaration at every
forward: it raises an error if the experts receive other tokens than the declared routing says.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine

WIDTH, EXPERTS, VOCABULARY, STEPS = 32, 8, 64, 60


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class MoEBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = scores.softmax(dim=-1).topk(2)
        return index, weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        index, weights = self.choose(self.router(tokens))
        output = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(index == i)
            output = output.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
        return x + output.view(x.shape)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [MoEBlock(), MoEBlock()]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))


def main() -> None:
    model = make_model()

    # The drlora part:
    drlora_torch.register_moe(
        MoEBlock,
        experts="experts",  # the ModuleList in the block
        projections=("up", "down"),  # the Linears in an expert
        router="router",  # the module that scores the experts
        routing=lambda block, scores: block.choose(scores),  # indices and weights
    )
    config = AllocatorConfig(
        r_init=2, r_target=4, r_max=12, warmup_steps=10, growth_interval=5, growth_end=40
    )
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        start = torch.randint(0, VOCABULARY, (16, 1), generator=generator)
        tokens = (start + torch.arange(24)) % VOCABULARY  # sequences that count upwards
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    for name, ranks in adapter.ranks().items():
        print(name, ranks.tolist())
    print("skipped steps:", adapter.skipped_steps)


if __name__ == "__main__":
    main()

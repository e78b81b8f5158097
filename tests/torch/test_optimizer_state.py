"""Optimizer state of slots that change owner: fresh as each optimizer means it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import drlora_torch
from drlora_torch.step import newborn
from drlora_torch.step.optimizers import fresh, meanings
from tests.torch import helpers, models, optimizers
from tests.torch.test_optimizer_newborn import newborn_rows

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
GROW = {"r_init": 8, "r_target": 16, "r_max": 32}
PRUNE = {"policy": "prune", "r_init": 24, "r_target": 16, "r_max": 32}
"""Large enough for 8-bit state, in rows of 24, 32 and 48 features, in blocks of 256."""
QUANTIZED = {**optimizers.BITS8, **optimizers.TORCHAO}
STRIDES = {"sgd8bit": 10.0, "rmsprop8bit": 10.0}
"""Updates over the learning rate; about 1 for the others. These two have no bias correction."""
UNCORRECTED = {"muon", "nadam", "bitsandbytes ademamix", "ademamix8bit"}
COUPLED = {"adafactor", "transformers adafactor", "transformers adafactor beta1"}
"""Rows share a column factor and the clipping, so newborn rows change the steps of others."""


@pytest.fixture(autouse=True)
def _without_compiler() -> Iterator[None]:
    """Torchao compiles its step, which takes minutes and changes no number here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def fresh_rows(kind: str, key: str, parameter: nn.Parameter) -> torch.Tensor | float:
    if key in ("z", "ax"):
        return parameter.detach()
    return {("adagrad", "sum"): 0.1, ("rprop", "step_size"): 1e-2}.get((kind, key), 0.0)


def states(optimizer: Optimizer, adapter: Any) -> dict[tuple[nn.Parameter, str], torch.Tensor]:
    return {
        (parameter, key): value
        for parameter in adapter.parameters()
        for key, value in optimizers.row_state(optimizer, parameter).items()
    }


@pytest.mark.parametrize("layout", optimizers.LAYOUTS)
@pytest.mark.parametrize("config", [GROW, PRUNE], ids=["grow", "prune"])
@pytest.mark.parametrize("kind", optimizers.kinds())
def test_an_event_makes_the_state_of_changed_slots_fresh(
    kind: str, config: dict[str, Any], layout: str
) -> None:
    """And of no other slot, though blocks of 8-bit state span rows."""
    model = models.build()
    adapter = helpers.attach(model, config=config, layout=layout, auto_step=False)
    optimizer = optimizers.ALL[kind](adapter.parameters())
    changed_rows = 0
    for seed in range(6):
        helpers.step(model, optimizer, seed)
        owner = {name: layer.lora.table.owner.copy() for name, layer in adapter.layers.items()}
        before = states(optimizer, adapter)
        adapter.step()
        after = states(optimizer, adapter)
        assert before.keys() == after.keys()
        assert before or kind == "sgd"
        for name, _, lora, slots in helpers.projections(adapter):
            changed = torch.from_numpy(owner[name] != lora.table.owner)
            changed_rows += int(changed.sum())
            for parameter in (slots.lora_A, slots.lora_B):
                for key in optimizers.row_state(optimizer, parameter):
                    old, new = before[parameter, key], after[parameter, key]
                    assert helpers.equal(new[~changed], old[~changed])
                    expected = torch.zeros_like(new) + fresh_rows(kind, key, parameter)
                    assert helpers.equal(new[changed], expected[changed])
    assert changed_rows == 2 * 2 * models.EXPERTS * 8


@pytest.mark.parametrize("layout", optimizers.LAYOUTS)
@pytest.mark.parametrize("kind", optimizers.kinds())
def test_freed_slots_stay_zero(kind: str, layout: str) -> None:
    model = models.build()
    adapter = helpers.attach(model, config=PRUNE, layout=layout)
    optimizer = optimizers.ALL[kind](adapter.parameters())
    for seed in range(9):
        helpers.step(model, optimizer, seed)
    if kind.startswith("schedulefree"):
        optimizer.eval()  # type: ignore[attr-defined]
    for _, _, lora, slots in helpers.projections(adapter):
        free = helpers.free(lora)
        assert len(free) == lora.table.num_slots - 16 * models.EXPERTS > 0
        assert not slots.lora_A[free].any()
        assert not slots.lora_B[free].any()


@pytest.mark.parametrize("layout", optimizers.LAYOUTS)
@pytest.mark.parametrize("kind", optimizers.kinds(optimizers.ALL.keys() - COUPLED))
def test_other_rows_move_as_if_there_had_been_no_event(kind: str, layout: str) -> None:
    """The same optimizer on copies, with the same gradients: bit for bit the same rows.

    Where a block of 8-bit state spans rows, the copy's free rows drift, as we do not hold them, and
    may set the scale of the block.
    """
    exact = kind not in optimizers.BITS8
    model = models.build()
    adapter = helpers.attach(model, config=GROW, layout=layout)
    make = optimizers.ALL[kind]
    optimizer = make(adapter.parameters())
    copies = [nn.Parameter(p.detach().clone()) for p in adapter.parameters()]
    untouched = make(copies)
    pairs = dict(zip(adapter.parameters(), copies, strict=True))

    def take_gradients(*_: Any) -> None:
        for parameter, copied in pairs.items():
            copied.grad = parameter.grad.clone()

    optimizer.register_step_pre_hook(take_gradients)
    first = {name: layer.lora.table.owner != -1 for name, layer in adapter.layers.items()}
    for seed in range(10):
        helpers.step(model, optimizer, seed)
        untouched.step()
        for name, _, _, slots in helpers.projections(adapter):
            old = torch.from_numpy(first[name])
            for parameter in (slots.lora_A, slots.lora_B):
                mine, other = parameter[old].detach(), pairs[parameter][old].detach()
                torch.testing.assert_close(mine, other, rtol=0, atol=0 if exact else 2e-4)
    assert len(adapter.events) == 2


@pytest.mark.parametrize("layout", optimizers.LAYOUTS)
@pytest.mark.parametrize("kind", optimizers.kinds(QUANTIZED.keys() - UNCORRECTED))
def test_newborn_rows_move_as_far_as_without_quantization(kind: str, layout: str) -> None:
    """Up to 16,000 in one step when the code 0 was taken for zero.

    With the right code, torchao still moved them by 75: second moments are rounded to zero next to
    the larger ones of an older row in the same block.
    """
    model = models.build()
    adapter = helpers.attach(model, config=GROW, layout=layout)
    optimizer = QUANTIZED[kind](adapter.parameters())
    start: dict[tuple[nn.Parameter, int], torch.Tensor] = {}
    for seed in range(10):
        helpers.step(model, optimizer, seed)
        if len(adapter.events) == 1 and not start:
            rows = newborn_rows(adapter, adapter.events[0])
            start = {(p, slot): p[slot].detach().clone() for p, slot in rows}
    moved = [float((p[slot] - row).detach().abs().max()) for (p, slot), row in start.items()]
    assert 1e-4 < max(moved) < (10 - 4) * 1e-2 * STRIDES.get(kind, 1.1)


def _wrapped(cls: Any, base: Any) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        wrapper = cls(base(parameters, lr=1e-2), momentum=0.9)
        wrapper.train()
        return wrapper

    return make


AROUND: dict[str, Callable[[Any], Any]] = {
    "wrapper": _wrapped(schedulefree.ScheduleFreeWrapper, SGD),
    "wrapper reference": _wrapped(schedulefree.ScheduleFreeWrapperReference, SGD),
    "closure": lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=1e-2),
}


@pytest.mark.parametrize("config", [GROW, PRUNE], ids=["grow", "prune"])
@pytest.mark.parametrize("kind", AROUND)
def test_every_copy_of_the_weights_is_fresh(kind: str, config: dict[str, Any]) -> None:
    """Schedule-free averages start at the newborn row, and those of freed rows are zero."""
    model = models.build()
    adapter = helpers.attach(model, config=config)
    optimizer = AROUND[kind](adapter.parameters())
    for seed in range(4):

        def closure(seed: int = seed) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(**helpers.batch(seed)).loss
            loss.backward()
            return loss

        optimizer.step(closure) if kind == "closure" else (closure(), optimizer.step())
    assert len(adapter.events) == 1
    changed = 0
    for parameter, slot in newborn_rows(adapter, adapter.events[0]):
        copies = [
            optimizer.state[parameter][key] for key in "xyz" if key in optimizer.state[parameter]
        ]
        assert copies
        for values in copies:
            torch.testing.assert_close(values[slot], parameter[slot].detach(), rtol=1e-6, atol=1e-9)
        changed += 1
    for _, _, lora, slots in helpers.projections(adapter):
        for parameter in (slots.lora_A, slots.lora_B):
            free = helpers.free(lora)
            assert not parameter[free].any()
            assert not optimizer.state[parameter]["z"][free].any()
            changed += len(free) if config is PRUNE else 0
    assert changed > 0


# -- unknown state -------------------------------------------------------------------------------


class Remembering(Optimizer):
    """Gradient descent whose state has the shape of the parameter and a name of its own."""

    key = "anchor"

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault(self.key, parameter.detach().clone())
                    parameter.sub_(parameter.grad, alpha=group["lr"])


class WithHistory(Remembering):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state[self.key] = [state[self.key]]


@pytest.fixture
def _meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meanings, "REGISTERED", {})


@pytest.mark.parametrize("cls", [Remembering, WithHistory])
def test_unknown_state_is_refused_at_the_first_step(cls: type[Optimizer]) -> None:
    model = models.build()
    optimizer = cls(helpers.attach(model).parameters())
    with pytest.raises(
        drlora_torch.AttachError, match=rf"'anchor'.* that tests\.{cls.__name__} keeps"
    ):
        helpers.step(model, optimizer)


@pytest.mark.parametrize("config", [{"policy": "uniform"}, {"r_init": 4}], ids=str)
def test_unknown_state_is_fine_where_ranks_never_change(config: dict[str, Any]) -> None:
    model = models.build()
    adapter = helpers.attach(model, config=config)
    optimizer = Remembering(adapter.parameters())
    for seed in range(7):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 2


def test_unknown_state_is_fine_after_the_last_event() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    first = helpers.adamw(adapter)
    for seed in range(6):
        helpers.step(model, first, seed)
    helpers.step(model, Remembering(adapter.parameters()))
    assert adapter.engine.step_count == 7


@pytest.mark.usefixtures("_meanings")
def test_the_meaning_of_state_can_be_told() -> None:
    drlora_torch.register_optimizer_state(Remembering, anchor="weights")
    model = models.build()
    adapter = helpers.attach(model, auto_step=False)
    optimizer = Remembering(adapter.parameters())
    for seed in range(4):
        helpers.step(model, optimizer, seed)
        event = adapter.step()
    assert event is not None
    for name, _, lora, slots in helpers.projections(adapter):
        for expert, (rank, delta) in enumerate(
            zip(event.ranks[name], event.deltas[name], strict=True)
        ):
            for dimension, slot in enumerate(helpers.owned(lora, expert)):
                same = torch.equal(
                    optimizer.state[slots.lora_A]["anchor"][slot], slots.lora_A[slot]
                )
                assert same == (dimension >= rank - delta)


def test_a_key_of_known_meaning_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    """And it is said once that drlora does not know how the optimizer counts its steps."""

    class Foreign(Remembering):
        key = "exp_avg"

    model = models.build()
    adapter = helpers.attach(model)
    optimizer = Foreign(adapter.parameters())
    for seed in range(7):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 2
    (said,) = [message for message in caplog.messages if "newborn" in message]
    assert "not corrected under Foreign: drlora does not know" in said


def test_blocks_of_4_bits_that_span_rows_are_refused() -> None:
    """Their map of second moments has no zero, so only whole blocks can be fresh."""
    import torchao.optim

    model = models.build()
    adapter = helpers.attach(model, config=GROW)
    optimizer = torchao.optim.AdamW4bit(adapter.parameters())
    with pytest.raises(drlora_torch.AttachError, match="block_size 128 must divide the row length"):
        helpers.step(model, optimizer)


class CountsElsewhere(Adam):
    """An Adam whose state has no step count: its group has, if ``shared``, or else itself."""

    def __init__(self, parameters: Any, shared: bool) -> None:
        super().__init__(parameters, lr=1e-2)
        self.shared, self.count = shared, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            if self.shared:
                group["step"] = self.count
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(gradient, 0.1)
                state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                denominator = (state["exp_avg_sq"] / (1 - 0.999**self.count)).sqrt() + 1e-8
                scale = 1 - 0.9**self.count
                parameter.addcdiv_(state["exp_avg"], denominator, value=-1e-2 / scale)


@pytest.mark.parametrize("shared", [False, True])
def test_an_adam_that_counts_elsewhere(shared: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Corrected like Adam if the count is in its group, else left alone, which is said once."""
    runs = []
    for make in (lambda p: CountsElsewhere(p, shared), lambda p: Adam(p, lr=1e-2)):
        model = models.build()
        adapter = helpers.attach(model)
        optimizer = make(adapter.parameters())
        runs.append([helpers.step(model, optimizer, seed) for seed in range(9)])
    assert (runs[0] == pytest.approx(runs[1], abs=1e-5)) == shared
    said = [message for message in caplog.messages if "newborn" in message]
    assert len(said) == (not shared)
    if said:
        assert "CountsElsewhere: it keeps no step count" in said[0]


# -- what is said, and where ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", optimizers.kinds())
def test_optimizers_without_a_correction_are_named(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = optimizers.ALL[kind](adapter.parameters())
    for seed in range(4):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 1
    said = [message for message in caplog.messages if "newborn" in message]
    assert len(said) == (kind in UNCORRECTED)


def test_plain_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = models.build()
    adapter = helpers.attach(model, newborn="plain")
    optimizer = optimizers.TORCH["muon"](adapter.parameters())
    for seed in range(4):
        helpers.step(model, optimizer, seed)
    assert caplog.messages == []


def test_the_table_of_the_documentation_names_every_optimizer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Optimizers\n(.*?)^## ", page, flags=re.M | re.S)
    told = set(re.findall(r"\w+", section))
    known = {*newborn.CORRECTIONS, *newborn.NOT_NEEDED, *newborn.REASONS, *meanings.OWN}
    names = {re.split(r"[. ]", name)[-1] for name in known} - {"_AdamBase"}
    assert {name.lower() for name in names} <= {name.lower() for name in told}
    assert {each.lower() for each in fresh.BITSANDBYTES_ALGORITHMS} <= {t.lower() for t in told}

"""A training loop that is killed with SIGKILL again and again, beside one that is not.

Run as ``python -m tests.ecosystem.killing FOLDER KILLS SEED OPTIMIZER...``; prints JSON. The loop
runs in children of this process, which has imported everything and computed nothing yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.optimization import Adafactor

import drlora_torch
from drlora_torch.storage import adapter_file
from tests.torch import helpers, models

BATCHES, MICRO_BATCHES = 16, 2
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "transformers": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
}
Say = Callable[[str], None]


def newest(folder: Path) -> Path | None:
    """A checkpoint has its name only once it is complete."""
    found = sorted(folder.glob("batch-*"), key=lambda path: int(path.name[6:]))
    return found[-1] if found else None


def save(
    folder: Path, adapter: drlora_torch.Adapter, optimizer: Any, losses: list[float], say: Say
) -> None:
    """Write everything into a new folder beside, then rename it."""
    temporary = folder / "writing"
    shutil.rmtree(temporary, ignore_errors=True)
    say("saving")
    adapter.save_pretrained(temporary)
    say("adapter saved")
    state = {"optimizer": optimizer.state_dict(), "generator": torch.get_rng_state()}
    torch.save(state, temporary / "training.pt")
    (temporary / "losses.json").write_text(json.dumps(losses))
    say("renaming")
    os.replace(temporary, folder / f"batch-{len(losses)}")


def train(folder: Path, optimizer_name: str, say: Say) -> None:
    """Begin, or go on from the newest checkpoint, to the end."""
    model = models.build()
    checkpoint = newest(folder)
    losses: list[float] = []
    if checkpoint is None:
        torch.manual_seed(0)
        adapter = helpers.attach(model, dropout=0.1, router="after_warmup")
        optimizer = OPTIMIZERS[optimizer_name](adapter.parameters())
    else:
        adapter = drlora_torch.load(model, checkpoint)
        optimizer = OPTIMIZERS[optimizer_name](adapter.parameters())
        state = torch.load(checkpoint / "training.pt")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        losses = json.loads((checkpoint / "losses.json").read_text())
    for number in range(len(losses), BATCHES):
        say("micro-batch")
        loss = model(**helpers.batch(number)).loss / MICRO_BATCHES
        loss.backward()
        losses.append(loss.item())
        if (number + 1) % MICRO_BATCHES == 0:
            say("stepping")
            optimizer.step()
            optimizer.zero_grad()
        save(folder, adapter, optimizer, losses, say)


def run(folder: Path, optimizer_name: str, kill_after: int | None, delay: float) -> str | None:
    """Train in a child; kill it ``delay`` seconds after so many words; the last word it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        with contextlib.suppress(KeyboardInterrupt):
            train(folder, optimizer_name, lambda word: _say(write, word))
            code = 0
        os._exit(code)
    os.close(write)
    heard: list[str] = []
    with os.fdopen(read) as words:
        for word in words:
            heard.append(word.strip())
            if kill_after is not None and len(heard) == kill_after:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                break
        status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return heard[-1]
    assert os.WEXITSTATUS(status) == 0, "the loop failed"
    return None


def _say(pipe: int, word: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, f"{word}\n".encode())


def outcome(folder: Path) -> dict[str, Any]:
    """What must not differ: losses, and every tensor and field of the final adapter."""
    last = newest(folder)
    assert last is not None
    held, description = adapter_file.read(last)
    del description["options"]["layers"]  # those that matched the user's patterns, after loading
    return {
        "losses": json.loads((last / "losses.json").read_text()),
        "description": description,
        "tensors": {name: tensor.tolist() for name, tensor in held.items()},
        "ranks": {
            name: tensor.tolist() for name, tensor in held.items() if name.endswith("engine/ranks")
        },
    }


def main(folder: Path, optimizer_name: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill a run ``kills`` times at random places and let it finish; compare with one in peace."""
    rng = random.Random(seed)
    straight, killed = folder / "straight", folder / "killed"
    straight.mkdir(parents=True)
    killed.mkdir()
    run(straight, optimizer_name, None, 0.0)
    places: list[str] = []
    unfinished = 0  # times that the run went on in the middle of an accumulation
    while len(places) < kills:
        # Few words, so that the run survives as many kills as are wanted; sometimes none is over.
        place = run(killed, optimizer_name, rng.randint(1, 9), rng.choice([0, 0, 1, 2, 4]) / 1e3)
        if place is None:
            shutil.rmtree(killed / newest(killed).name)  # type: ignore[union-attr]
            continue
        places.append(place)
        if (last := newest(killed)) is None:
            continue
        unfinished += int(last.name[6:]) % MICRO_BATCHES != 0
        if int(last.name[6:]) == BATCHES:
            for path in killed.iterdir():  # all done: begin again, to be killed more often
                shutil.rmtree(path)
    run(killed, optimizer_name, None, 0.0)
    want, have = outcome(straight), outcome(killed)
    return {
        "same": want == have,
        "places": places,
        "unfinished": unfinished,
        "losses": want["losses"],
        "ranks": want["ranks"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen, number, start, *names = sys.argv[1:]
    results = {name: main(Path(chosen) / name, name, int(number), int(start)) for name in names}
    print(json.dumps(results))

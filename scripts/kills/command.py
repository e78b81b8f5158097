"""The command line of the campaigns."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scripts.kills import faults, worlds
from scripts.kills.children import run
from scripts.kills.jobs import Job, all_jobs
from scripts.kills.killing import Campaign

SHARES = {
    "finetune": 90, "quantized": 16, "processes": 14, "save": 20, "record": 24, "export": 20,
    "merge": 16,
}  # fmt: skip
"""Kills of each kind among 200."""
FAULTY = (
    "save", "export over an export", "merge over a merge", "export", "merge", "merge --quantize",
    "olmoe --router=frozen --layout=pooled",
)  # fmt: skip
"""Work that is done under every fault, beside the recording."""


def import_everything() -> None:
    """Import what children need, so that they start at once; nothing is computed here."""
    import bitsandbytes  # noqa: F401
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import drlora_torch.cli
    import drlora_torch.finetune.after.merged
    import drlora_torch.finetune.job

    torch.set_num_threads(1)
    get_checkpoint_conversion_mapping("olmoe")  # compiles a thousand regular expressions
    drlora_torch.finetune.job.write_report = lambda run: run.path / "report.html"  # takes seconds
    gc.collect()
    gc.freeze()  # children need not look through all that was imported


def prepare(world: Path, kinds: list[str]) -> None:
    """Write models, data, and the finished runs that are exported and merged."""
    world.mkdir()
    steps = [functools.partial(worlds.make, world)]
    if {"export", "merge"} & set(kinds):
        steps.append(functools.partial(worlds.finish, world, "finished", []))
    if "merge" in kinds:
        steps.append(functools.partial(worlds.finish, world, "packed", ["--quantization=nf4"]))
    for step in steps:
        ended = run(step, world)
        if ended.code:
            raise SystemExit(ended.said)


def kill(campaign: Campaign, jobs: list[Job], kills: int, seed: int, console: Console) -> bool:
    """Kill each kind of work its share of times; print a table; True if nothing was found."""
    kinds = [kind for kind in SHARES if any(job.kind == kind for job in jobs)]
    whole = sum(SHARES[kind] for kind in kinds)
    table = Table("work", "kills", "cases", "equal in the end", "failures")
    counts = {kind: Counter[str]() for kind in kinds}
    with contextlib.suppress(KeyboardInterrupt), Progress(console=console) as progress:
        for kind, count in counts.items():
            wanted = max(1, round(kills * SHARES[kind] / whole))
            bar = progress.add_task(kind, total=wanted)
            while count["kills"] < wanted:
                case = f"--seed {seed} --case {kind}-{count['cases']}"
                for problem in one(campaign, jobs, kind, count["cases"], seed, count):
                    console.print(f"{case}: {problem}", markup=False, soft_wrap=True)
                progress.update(bar, completed=count["kills"])
    for kind, count in counts.items():
        told = (count[name] for name in ("kills", "cases", "equal", "failures"))
        table.add_row(kind, *map(str, told))
    total = sum((count for count in counts.values()), Counter())
    table.add_row("all", *(str(total[name]) for name in ("kills", "cases", "equal", "failures")))
    Console().print(table)
    return not total["failures"]


def one(
    campaign: Campaign, jobs: list[Job], kind: str, number: int, seed: int, count: Counter[str]
) -> list[str]:
    """Do one case."""
    draw = random.Random(f"{seed} {kind} {number}")
    mine = [job for job in jobs if job.kind == kind]
    job = mine[number % len(mine)]
    tally = campaign.case(job, draw)
    count["cases"] += 1
    count["kills"] += tally.kills
    count["failures" if tally.problems else "equal"] += 1
    return [f"{job.name}: {problem}" for problem in tally.problems]


def fail(
    campaign: Campaign, disk: Path | None, jobs: list[Job], only: str | None, console: Console
) -> bool:
    """Do some work of each kind under every fault; print a table; True if nothing was found."""
    chosen = [job for job in jobs if job.name in FAULTY or job.kind == "record"]
    cases = [
        (job, fault, part) for job in chosen for fault in faults.FAULTS for part in faults.PARTS
    ]
    if only:
        cases = [each for each in cases if only in (name_of(*each), each[0].kind, each[1])]
    count: Counter[str] = Counter()
    with contextlib.suppress(KeyboardInterrupt), Progress(console=console) as progress:
        for each in progress.track(cases, description="faults"):
            problems = faults.case(campaign, disk, *each)
            count[each[1]] += 1
            count[f"{each[1]}, failures"] += bool(problems)
            for problem in problems:
                text = f'--faults --case "{name_of(*each)}": {problem}'
                console.print(text, markup=False, soft_wrap=True)
    table = Table("fault", "cases", "failures")
    for fault in faults.FAULTS:
        table.add_row(fault, str(count[fault]), str(count[f"{fault}, failures"]))
    Console().print(table)
    return not any(count[f"{fault}, failures"] for fault in faults.FAULTS)


def name_of(job: Job, fault: str, part: float) -> str:
    return f"{job.name}, {fault}, {part}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all [200]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--case", help="one case, such as finetune-12, which a failure names")
    parser.add_argument("--faults", action="store_true", help="faults of the disk, and signals")
    return parser.parse_args()


def main() -> None:
    """Run a campaign; the exit status is 1 if it has found anything."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was found so far is told
    given, console, start = arguments(), Console(stderr=True), time.monotonic()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="drlora-kills-") as folder:
        prepare(Path(folder, "world"), given.kinds)
        jobs = [job for job in all_jobs(Path(folder, "world")) if job.kind in given.kinds]
        if given.faults:
            with faults.small_disk(Path(folder, "disk")) as disk:
                campaign = Campaign(disk or Path(folder, "disk"))
                good = fail(campaign, disk, jobs, given.case, console)
            print(f"{time.monotonic() - start:.0f} s")
            sys.exit(not good)
        campaign = Campaign(Path(folder, "work"))
        if given.case:
            kind, _, number = given.case.rpartition("-")
            problems = one(campaign, jobs, kind, int(number), given.seed, Counter())
            sys.exit("\n".join(problems) or 0)
        good = kill(campaign, jobs, given.kills, given.seed, console)
    print(f"seed {given.seed}, {time.monotonic() - start:.0f} s")
    sys.exit(not good)

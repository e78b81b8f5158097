"""``drlora finetune --processes N``: run the command in N processes, with torchrun."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from drlora_core.cli.app import print_error
from drlora_core.cli.console import make_console
from drlora_torch.errors import RunError
from drlora_torch.finetune.folder import RECIPE
from drlora_torch.finetune.sharding import Sharding
from drlora_torch.finetune.signature import command_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

WORKER = "drlora_torch.finetune.worker"


def must_launch(processes: int | None) -> TypeGuard[int]:
    """Return True if this process is to start the others; False if it is to train.

    Raises:
        RunError: a launcher has started another number of processes already, or the machine
            has too few GPUs.
    """
    if processes is None:
        return False
    if "RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        started = os.environ.get("WORLD_SIZE", "1")
        if started != str(processes):
            raise RunError(
                f"--processes {processes} inside a launcher that has started {started} (WORLD_SIZE "
                f"in the environment); leave out --processes, or use --processes {started}"
            )
        return False
    if processes > 1:
        _check_machine(processes)
    return processes > 1


def _check_machine(processes: int) -> None:
    import torch

    if not torch.distributed.is_available():
        raise RunError(
            f"--processes {processes}: this build of torch has no torch.distributed; "
            "use --processes 1"
        )
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise RunError(
            f"--processes {processes}: each process needs a GPU of its own, and this machine has "
            f"{gpus}; use --processes {gpus} at most"
        )


def finetune_arguments(
    chosen: Mapping[str, Any], config: Path | None, output: Path, resume: bool
) -> list[str]:
    """Return the arguments of ``drlora`` for a run, or for the rest of it.

    Args:
        chosen: fields of :class:`~.recipe.Recipe` that the user has given.
        config: file with more of them.
        output: folder of the run.
        resume: whether the run in ``output`` goes on; its recipe is in there.
    """
    words = command_line({n: v for n, v in chosen.items() if n not in ("processes", "output")})
    place = f"--resume={output}" if resume else f"--output={output}"
    return ["finetune", place, *([f"--config={config}"] if config else []), *words]


def torchrun_arguments(processes: int, arguments: list[str], logs: str) -> list[str]:
    """Return the arguments of torchrun that run ``drlora`` with some in every process."""
    own = ["--standalone", f"--nproc-per-node={processes}", f"--log-dir={logs}", "--module"]
    return [*own, WORKER, *arguments]


def set_environment(processes: int) -> None:
    """Share the cores among the processes, unless the user has; keep their imports as ours."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # With -m, Python would look for modules in the working folder first; the command does not.
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def launch(processes: int, arguments: list[str], folder: Path, sharding: Sharding) -> NoReturn:
    """Run ``drlora`` with these arguments in several processes, and exit like them.

    A signal ends all of them. What went wrong is said in one sentence.

    Raises:
        SystemExit: always; 0 if all succeeded, otherwise with the code of the process that failed
            first, or 128 and the number of the signal.
    """
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = torch.distributed.run  # has no types
    set_environment(processes)
    logging.disable(logging.ERROR)  # torchrun reports a failure in many lines; we do in one
    try:
        with tempfile.TemporaryDirectory(prefix="drlora-") as logs:
            torchrun.run(torchrun.parse_args(torchrun_arguments(processes, arguments, logs)))
    except ChildFailedError as error:
        text, code = describe_failure(error, processes)
    except SignalException as error:
        text, code = f"stopped by {error.sigval.name}", 128 + error.sigval
    else:
        raise SystemExit(0)
    finally:
        logging.disable(logging.NOTSET)
    make_console().show_cursor()  # the progress bar had no time to
    if code > 128 and (folder / RECIPE).is_file():
        options = " ".join([shlex.quote(str(folder)), f"--processes {processes}", *sharding.words])
        text += f"; go on with: drlora finetune --resume {options}"
    print_error(text)
    raise SystemExit(code)


def describe_failure(error: ChildFailedError, processes: int) -> tuple[str, int]:
    """Return what the process that failed first has said, or what ended it, and the exit code."""
    rank, failure = min(error.failures.items(), key=lambda item: _moment(item[1]))
    if "timestamp" in failure.error_file_data:
        return failure.message, failure.exitcode
    who = f"process {rank + 1} of {processes}"
    if failure.exitcode < 0:
        how = f"was killed by signal {-failure.exitcode} ({failure.signal_name()})"
        return f"{who} {how}", 128 - failure.exitcode
    return f"{who} ended with exit code {failure.exitcode}", failure.exitcode


def _moment(failure: ProcessFailure) -> float:
    """When a process failed; those that torchrun ended because of another one come last.

    A process that says nothing has the time at which torchrun noticed, in whole seconds. The
    others may lose their connection to it and say so before that.
    """
    if failure.exitcode == -signal.SIGTERM:
        return float("inf")
    said = failure.error_file_data.get("timestamp")
    return float(failure.timestamp - 1 if said is None else said)

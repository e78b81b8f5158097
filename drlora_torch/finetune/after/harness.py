"""Tasks of the evaluation harness of EleutherAI (lm-eval), where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from drlora_core.errors import near_misses
from drlora_torch.errors import RunError


def check_tasks(names: Sequence[str]) -> None:
    """Refuse tasks that the harness does not have, before a model is loaded.

    Raises:
        RunError: names what is close; or lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RunError("--tasks needs lm-eval, which is not installed: pip install lm-eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if not manager.match_tasks([name]):
            raise RunError(
                f"--tasks {name}: lm-eval has no such task; {near_misses(name, manager.all_tasks)}"
            )


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    batch_size: int,
    limit: int | None,
    chat: bool,
) -> dict[str, dict[str, float]]:
    """Run tasks and return their metrics, by task.

    Args:
        model: of Transformers.
        tokenizer: of the model.
        names: of the tasks.
        batch_size: rows of a forward pass.
        limit: rows of each task; None: all.
        chat: use the chat template.

    Raises:
        RunError: a task failed, such as one whose data could not be fetched.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(names),
            limit=limit,
            apply_chat_template=chat,
        )["results"]
    except Exception as error:  # tasks, their data and metrics have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"--tasks {','.join(names)}: lm-eval says: {reason}") from error
    return {
        task: {n: float(v) for n, v in metrics.items() if isinstance(v, (int, float))}
        for task, metrics in results.items()
    }

"""How the processes of a run hold the model: ``--fsdp-size``, ``--ep-size`` and ``--tp-size``."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from drlora_core.validation import reword_errors
from drlora_torch.errors import RunError
from drlora_torch.finetune.groups import Group


def can_share_features() -> bool:
    """Whether Accelerate accepts tensor parallelism on this machine."""
    import torch

    return torch.cuda.is_available()


class Sharding(Group):
    """Sizes with which Transformers spreads a model over processes as it loads it.

    They say where a run goes, not what it is: the folder of a run does not keep them, and a
    checkpoint goes on with others.

    Raises:
        pydantic.ValidationError: a size below 1.

    Example:
        >>> Sharding(fsdp_size=4, ep_size=2).words
        ['--fsdp-size=4', '--ep-size=2']
        >>> Sharding(fsdp_size=2, tp_size=2).batches(4)
        2
    """

    panel: ClassVar[str] = "Several processes"

    fsdp_size: int = Field(default=1, ge=1)
    """Processes that hold the weights together, each with rows of its own."""
    ep_size: int = Field(default=1, ge=1)
    """Processes that share the experts of a layer, each with whole ones."""
    tp_size: int = Field(default=1, ge=1)
    """Processes that share the features of a layer, all with the same rows."""

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    @property
    def is_sharded(self) -> bool:
        """True if processes are to hold the model together."""
        return max(self.fsdp_size, self.ep_size, self.tp_size) > 1

    @property
    def words(self) -> list[str]:
        """The options as on a command line; sizes of 1 are left out."""
        sizes = self.model_dump(include=set(Sharding.model_fields)).items()
        return [f"--{name.replace('_', '-')}={size}" for name, size in sizes if size > 1]

    def batches(self, processes: int) -> int:
        """How many different batches some processes train on."""
        return processes // self.tp_size

    def check(self, processes: int) -> None:
        """Refuse sizes that do not fit some processes, or together.

        Raises:
            RunError: names the values, those that are accepted, and the fix.
        """
        if not self.is_sharded:
            return
        fsdp, ep, tp = self.fsdp_size, self.ep_size, self.tp_size
        product = fsdp * tp
        if product == 1:
            raise RunError(
                f"--ep-size {ep} spreads the experts over the processes of --fsdp-size and "
                f"--tp-size, which are 1; add --fsdp-size {ep}"
            )
        if product != processes:
            raise RunError(
                f"--fsdp-size {fsdp} times --tp-size {tp} is {product}, but must be the number of "
                f"processes, which is {processes}; use --processes {product}, or other sizes"
            )
        if ep > 1 and (ep % tp or product % ep):
            fits = [size for size in range(tp, product + 1, tp) if product % size == 0]
            raise RunError(
                f"--ep-size {ep} must be a multiple of --tp-size {tp} that divides --fsdp-size "
                f"times --tp-size ({product}); use one of {', '.join(map(str, fits))}"
            )
        if tp > 1 and not can_share_features():
            raise RunError(
                f"--tp-size {tp} needs a GPU for each process, since Accelerate has tensor "
                f"parallelism only there; on CPUs, use --tp-size 1 with --fsdp-size {product}, and "
                "--ep-size if you like"
            )

    def distributed_config(self) -> Any:
        """The ``DistributedConfig`` of Transformers; None for a model that is not sharded."""
        if not self.is_sharded:
            return None
        from transformers.distributed import DistributedConfig

        return DistributedConfig(**self.model_dump(include=set(Sharding.model_fields)))

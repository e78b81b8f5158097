"""Register our quantizer with Transformers as soon as that imports its own.

``import drlora_torch`` alone must make ``from_pretrained`` read experts that drlora has packed, and
must not import Transformers, which takes seconds: the command line has to start fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)
REGISTRY = "transformers.quantizers.auto"
QUANTIZERS = (
    "drlora_torch.models.quantization.quantizer",
    "drlora_torch.models.quantization.stored_quantizers",
)


class _AtImport(MetaPathFinder):
    """Steps aside for the finder that knows the registry, and acts once that is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            own = spec.loader.exec_module

            def execute(module: ModuleType) -> None:
                own(module)
                try:
                    _import_quantizers()
                except ImportError as error:  # of a Transformers that we do not know
                    logger.warning("packed experts cannot be loaded: %s", error)

            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def register_quantizers() -> None:
    """Register now, if Transformers has been imported that far, or when it is."""
    if REGISTRY in sys.modules:
        _import_quantizers()
    else:
        sys.meta_path.insert(0, _AtImport())


def _import_quantizers() -> None:
    """Import each of them; one that is being imported, and so is why we are here, registers then.

    Neither may import the other.
    """
    for name in QUANTIZERS:
        importlib.import_module(name)

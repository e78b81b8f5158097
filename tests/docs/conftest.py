"""What several modules of these tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import hub


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hub with small models."""
    folder = tmp_path_factory.mktemp("hub")
    hub.write(folder)
    return folder

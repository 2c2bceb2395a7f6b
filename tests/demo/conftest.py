"""A folder that the demo and the notebook share, so that the model that knows is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ``.cache`` is where both keep the trained model."""
    return tmp_path_factory.mktemp("demo")

"""Fixtures for all rooms."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real CT and MR: MLLM3D_REAL_DATA, or `shared/data` beside the checkout; else a skip."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MLLM3D_REAL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there (set MLLM3D_REAL_DATA)")
    return folder

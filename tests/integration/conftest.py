"""Runs with light agents; see `lightbed`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lightbed import Bed, Prepared, prepare


@pytest.fixture(scope="session")
def prepared(
    small_model: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"), small_model, texts)


@pytest.fixture
def bed(prepared: Prepared, tmp_path: Path) -> Iterator[Bed]:
    bed = Bed(tmp_path, prepared)
    yield bed
    bed.close()

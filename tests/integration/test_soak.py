"""A short soak of each kind; `make soak` runs the long ones."""

from pathlib import Path

import pytest
from soak import Soak, prepare


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("late", "seed"), [(False, 1), (True, 2)])
def test_whatever_goes_wrong_every_accepted_update_counts_exactly_once(
    tmp_path: Path, small_model: Path, texts: dict[str, Path], late: bool, seed: int
) -> None:
    text = texts["counting-held_out"]
    config = prepare(tmp_path, small_model, text, num_rounds=40, late=late)
    soak = Soak(tmp_path, config, tmp_path / "server", 40, seed, limit_s=500)
    soak.run()
    # It was not for nothing: things went wrong, and most rounds brought something all the same.
    assert sum(soak.happened[name] for name in ("kill server", "kill agent", "partition")) > 0
    assert soak.happened["rounds done"] > 30

import time

from fedpruner_server.clock import Clock


def test_the_clock_starts_at_wall_clock_time_and_ignores_that_somebody_sets_it(monkeypatch):
    now = {"wall": 1000.0, "monotonic": 5.0}
    monkeypatch.setattr(time, "time", lambda: now["wall"])
    monkeypatch.setattr(time, "monotonic", lambda: now["monotonic"])
    clock = Clock()
    assert clock.now() == 1000.0
    now.update(wall=9_999_999.0, monotonic=8.0)
    assert clock.now() == 1003.0
    now.update(wall=-5.0)
    assert clock.now() == 1003.0
    assert Clock().now() == -5.0  # after a restart

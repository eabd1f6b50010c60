import pytest

from fedpruner_common.errors import Unauthenticated, UnknownClient
from fedpruner_server.registry import DeviceState, Registry

GIB = 1 << 30


@pytest.fixture
def registry():
    return Registry(lease_s=30.0)


def join(registry, client_id="a", now=0.0, budget=GIB):
    return registry.register(
        client_id, memory_budget_bytes=budget, floor_bytes=100, memory_kind="rss", now=now
    )


def test_a_device_is_known_by_its_session(registry):
    device = join(registry)
    assert registry.authenticate("a", device.session, now=1.0) is device


def test_a_client_that_never_registered_is_told_so(registry):
    with pytest.raises(UnknownClient, match="'x' is not registered"):
        registry.authenticate("x", "", now=0.0)


@pytest.mark.parametrize("session", ["", "guess", "größer"])
def test_a_wrong_session_is_refused_and_is_no_sign_of_life(registry, session):
    device = join(registry)
    with pytest.raises(Unauthenticated):
        registry.authenticate("a", session, now=9.0)
    assert device.last_seen == 0.0


def test_a_new_session_ends_the_old_one(registry):
    old = join(registry).session
    new = join(registry).session
    assert new != old
    with pytest.raises(Unauthenticated, match="second agent using the same name"):
        registry.authenticate("a", old, now=0.0)
    registry.authenticate("a", new, now=0.0)


def test_registering_again_keeps_the_counts_and_takes_the_new_offer(registry):
    device = join(registry)
    device.bytes_up, device.unfit, device.task_id = 77, "too small", "t1"
    again = join(registry, now=5.0, budget=2 * GIB)
    assert again is device
    assert (again.bytes_up, again.unfit, again.memory_budget_bytes) == (77, "", 2 * GIB)
    assert again.last_seen == 5.0


def test_a_device_is_lost_after_its_lease_and_back_with_its_next_call(registry):
    device = join(registry, now=100.0)
    assert registry.state(device, now=130.0) is DeviceState.IDLE
    assert registry.state(device, now=130.1) is DeviceState.LOST
    registry.authenticate("a", device.session, now=131.0)
    assert registry.state(device, now=131.0) is DeviceState.IDLE


def test_available_are_those_that_live_are_idle_and_fit(registry):
    join(registry, "idle", now=100.0)
    join(registry, "working", now=100.0).task_id = "t1"
    join(registry, "unfit", now=100.0).unfit = "too small"
    join(registry, "lost", now=0.0)
    assert [d.client_id for d in registry.available(now=100.0)] == ["idle"]
    assert registry.state(registry.devices["working"], now=100.0) is DeviceState.WORKING

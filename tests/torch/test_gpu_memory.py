"""What a GPU offers, on a made-up driver; and the peak on memory that GPU and host share."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fedpruner_client import memory
from fedpruner_client.gpu import gpu_offer, is_unified, limit_allocator
from fedpruner_client.memory import PeakMeter

MIB = 1 << 20
GIB = 1 << 30
CONTEXT = 400 * MIB
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Card:
    """One device, as the driver and torch's allocator see it."""

    def __init__(
        self, total: int, *, integrated: int | None = 0, others: int = 0, reserved: int = 0
    ) -> None:
        self.total, self.others, self.reserved = total, others, reserved
        self.has_context = False
        self.fraction = 1.0
        self.properties = SimpleNamespace(total_memory=total)
        if integrated is not None:
            self.properties.is_integrated = integrated

    def free(self) -> int:
        context = CONTEXT if self.has_context else 0
        return self.total - self.others - self.reserved - context


class OutOfMemoryError(RuntimeError):
    pass


class Cuda:
    """The part of `torch.cuda` that is used, with torch's own signatures."""

    def __init__(self, *cards: Card) -> None:
        self.cards = cards

    def _card(self, device: torch.device) -> Card:
        return self.cards[device.index or 0]

    def synchronize(self, device: torch.device) -> None:
        self._card(device).has_context = True

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self._card(device).free(), self._card(device).total

    def memory_reserved(self, device: torch.device) -> int:
        return self._card(device).reserved

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return self._card(device).properties

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        if not isinstance(fraction, float):  # torch raises so
            raise TypeError("Invalid type for fraction argument, must be `float`")
        if not 0 <= fraction <= 1:
            raise ValueError("Invalid fraction value")
        self._card(device).fraction = fraction

    def reserve(self, num_bytes: int, device: torch.device) -> None:
        card = self._card(device)
        if card.reserved + num_bytes > int(card.fraction * card.total):
            raise OutOfMemoryError("CUDA out of memory.")
        card.reserved += num_bytes


def torch_with(*cards: Card) -> SimpleNamespace:
    return SimpleNamespace(cuda=Cuda(*cards))


def test_a_discrete_gpu_offers_what_is_free_besides_the_context_and_what_it_holds() -> None:
    offer = gpu_offer(torch_with(Card(8 * GIB, reserved=20 * MIB)), FIRST, 1 * GIB)
    assert offer.kind == "cuda"
    assert offer.total_bytes == 8 * GIB
    assert offer.floor_bytes == 20 * MIB
    assert offer.free_bytes == 8 * GIB - CONTEXT - 20 * MIB
    assert offer.available_bytes == 8 * GIB - CONTEXT


def test_what_other_processes_hold_is_not_offered() -> None:
    card = Card(8 * GIB, others=5 * GIB, reserved=20 * MIB)
    assert gpu_offer(torch_with(card), FIRST, 1 * GIB).available_bytes == 3 * GIB - CONTEXT


def test_a_slice_of_a_card_offers_the_slice() -> None:
    card = Card(10 * GIB)
    card.properties.total_memory = 80 * GIB  # should a driver tell of the whole card here
    offer = gpu_offer(torch_with(card), FIRST, 1 * GIB)
    assert (offer.total_bytes, offer.available_bytes) == (10 * GIB, 10 * GIB - CONTEXT)


def test_the_second_device_is_asked_about_itself() -> None:
    cards = Card(8 * GIB), Card(24 * GIB, reserved=2 * MIB)
    offer = gpu_offer(torch_with(*cards), SECOND, 1 * GIB)
    assert (offer.total_bytes, offer.floor_bytes) == (24 * GIB, 2 * MIB)
    assert offer.available_bytes == 24 * GIB - CONTEXT
    assert not cards[0].has_context


def test_a_gpu_that_shares_memory_offers_what_the_host_has_not_what_cuda_says() -> None:
    card = Card(32 * GIB, integrated=1, reserved=20 * MIB)
    offer = gpu_offer(torch_with(card), FIRST, 6 * GIB, resident_bytes=300 * MIB)
    assert offer.kind == "unified"
    assert offer.free_bytes == 6 * GIB
    assert offer.floor_bytes == 320 * MIB
    assert offer.available_bytes == 6 * GIB + 320 * MIB


def test_page_cache_that_cuda_takes_for_used_is_offered_on_shared_memory() -> None:
    card = Card(8 * GIB, integrated=1, others=7 * GIB)  # nearly all of it cache
    assert gpu_offer(torch_with(card), FIRST, 5 * GIB).free_bytes == 5 * GIB


def test_the_floor_on_shared_memory_holds_the_resident_set_of_this_process() -> None:
    offer = gpu_offer(torch_with(Card(8 * GIB, integrated=1)), FIRST, 5 * GIB)
    assert offer.floor_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_an_older_torch_without_the_property_means_a_discrete_gpu(tmp_path: Path) -> None:
    assert not is_unified(torch_with(Card(8 * GIB, integrated=None)), FIRST, tmp_path)


def test_an_older_torch_without_the_property_on_a_tegra_means_shared_memory(
    tmp_path: Path,
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    fake = torch_with(Card(8 * GIB, integrated=None))
    assert is_unified(fake, FIRST, tmp_path)
    assert gpu_offer(fake, FIRST, 5 * GIB, root=tmp_path).kind == "unified"


def test_a_discrete_card_in_a_tegra_board_has_its_own_memory(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    assert not is_unified(torch_with(Card(8 * GIB, integrated=0)), FIRST, tmp_path)


def test_more_than_the_budget_is_refused_though_the_card_has_it() -> None:
    fake = torch_with(Card(8 * GIB), Card(8 * GIB))
    assert limit_allocator(fake, SECOND, 2 * GIB)
    fake.cuda.reserve(2 * GIB, SECOND)
    with pytest.raises(OutOfMemoryError):
        fake.cuda.reserve(1 * MIB, SECOND)
    fake.cuda.reserve(8 * GIB, FIRST)  # the other device is free as before


def test_the_budget_of_a_slice_is_taken_of_the_slice() -> None:
    card = Card(10 * GIB)
    card.properties.total_memory = 80 * GIB
    limit_allocator(torch_with(card), FIRST, 5 * GIB)
    assert card.fraction == 0.5


def test_a_budget_beyond_the_card_is_no_limit() -> None:
    card = Card(8 * GIB)
    assert limit_allocator(torch_with(card), FIRST, 9 * GIB)
    assert card.fraction == 1.0


def test_no_budget_at_all_lets_nothing_through() -> None:
    card = Card(8 * GIB)
    limit_allocator(torch_with(card), FIRST, 0)
    assert card.fraction == 0.0


def test_a_negative_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="-1"):
        limit_allocator(torch_with(Card(8 * GIB)), FIRST, -1)


def test_the_allocator_of_shared_memory_is_not_limited() -> None:
    card = Card(8 * GIB, integrated=1)
    assert not limit_allocator(torch_with(card), FIRST, 1 * GIB)
    assert card.fraction == 1.0


def test_looking_at_gpus_does_not_load_torch() -> None:
    program = "import sys, fedpruner_client.gpu; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch's CUDA allocator, made up: `peak` is what it reports."""
    state = SimpleNamespace(peak=0)

    def nothing(device: torch.device) -> None:
        del device

    def reset(device: torch.device) -> None:
        del device
        state.peak = 0

    fakes = {
        "synchronize": nothing,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": reset,
        "max_memory_reserved": lambda device: state.peak * (device.index == 0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def burst(num_bytes: int) -> None:
    """Hold so much for a moment."""
    held = bytearray(num_bytes)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])


def test_the_peak_on_shared_memory_is_that_of_the_host_and_of_the_allocator(
    allocator: SimpleNamespace,
) -> None:
    meter = PeakMeter(FIRST, unified=True)
    allocator.peak = 7 * GIB  # before the start: does not count
    meter.start()
    before = meter.high_water_bytes()
    burst(64 * MIB)
    allocator.peak = 1 * GIB
    assert meter.peak_bytes() - before == pytest.approx(1 * GIB + 64 * MIB, abs=8 * MIB)


def test_the_peak_of_a_discrete_gpu_is_the_allocators_alone(allocator: SimpleNamespace) -> None:
    meter = PeakMeter(FIRST, unified=False)
    meter.start()
    burst(64 * MIB)
    allocator.peak = 1 * GIB
    assert meter.high_water_bytes() == meter.peak_bytes() == 1 * GIB


@pytest.mark.parametrize("kernel_helps", [True, False])
def test_the_high_water_mark_can_be_read_while_the_span_goes_on(
    kernel_helps: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not kernel_helps:
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no" / "such")
    meter = PeakMeter(torch.device("cpu"))
    meter.start()
    before = meter.high_water_bytes()
    held = bytearray(32 * MIB)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    first = meter.high_water_bytes()
    more = bytearray(64 * MIB)
    more[:: 1 << 12] = b"x" * len(more[:: 1 << 12])
    second = meter.high_water_bytes()
    del held, more
    assert first - before == pytest.approx(32 * MIB, abs=4 * MIB)
    assert second - before == pytest.approx(96 * MIB, abs=4 * MIB)
    assert meter.peak_bytes() == pytest.approx(second, abs=MIB)
    assert meter.peak_bytes() == pytest.approx(second, abs=MIB)  # and once more


def test_the_mark_starts_anew_with_each_span() -> None:
    meter = PeakMeter(torch.device("cpu"))
    meter.start()
    burst(128 * MIB)
    first = meter.peak_bytes()
    meter.start()
    assert meter.peak_bytes() < first - 64 * MIB


def test_the_high_water_mark_can_be_read_before_the_span() -> None:
    assert PeakMeter(torch.device("cpu")).high_water_bytes() >= 10 * MIB

import pytest

from fedpruner_common.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("1K", 1024),
        ("512 MB", 536_870_912),  # 512 * 1024 * 1024
        ("6GiB", 6_442_450_944),  # 6 * 1024**3
        ("1.5g", 1_610_612_736),  # 1.5 * 1024**3
        (" 2 tib ", 2_199_023_255_552),  # 2 * 1024**4
    ],
)
def test_sizes_are_read_in_powers_of_1024(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "6 PiB", "1e9", "6 GiB free", "nan", ".5G"])
def test_what_is_not_a_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="write for example 6GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.5 KiB"),
        (6 * 1024**2, "6 MiB"),
        (1_471_026_299, "1.37 GiB"),  # 1.37 * 1024**3
        (2 * 1024**4, "2 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_sizes_are_written_with_three_digits_and_a_binary_unit(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize("num_bytes", [1000, 1024, 1023 * 1024, 1_023_693, 1_048_320_000, 999_999])
def test_no_size_is_written_with_an_exponent(num_bytes):
    # 1_023_693 B is 999.7 KiB: rounded to three digits that is 1000, which %g writes as 1e+03.
    assert "e" not in format_bytes(num_bytes)


def test_what_is_written_reads_back_within_its_three_digits():
    for exponent in range(8, 45):
        for mantissa in (1.0, 1.13, 1.77):
            num_bytes = int(mantissa * 2**exponent)
            assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.005)

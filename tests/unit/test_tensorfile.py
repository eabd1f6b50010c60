import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from fedpruner_common.errors import ModelError
from fedpruner_server.tensorfile import read_header, sliced

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=np.int64),
    "scalar": np.array(3.5, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float16),
    "large": np.arange(700_000, dtype=np.float32),  # 2.8 MB: over several chunks
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def f32(begin, end, shape=None):
    return {"dtype": "F32", "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def test_the_header_says_what_is_in_a_file_and_where(path):
    located = read_header(path)
    assert located.keys() == TENSORS.keys()
    content = path.read_bytes()
    for name, values in TENSORS.items():
        info, place = located[name].info, located[name].place
        assert (info.name, info.shape, info.num_bytes) == (name, values.shape, values.nbytes)
        assert content[place.start : place.start + place.num_bytes] == values.tobytes()
    assert (located["b"].info.dtype, located["a"].info.dtype) == ("F32", "I64")


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file_is_refused(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_header(path)


def test_bytes_after_the_end_are_refused(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelError, match="bytes after its end"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": f32(0, 8), "b": f32(4, 12)}, b"x" * 12),  # overlap
        ({"a": f32(0, 4), "b": f32(8, 12)}, b"x" * 12),  # gap
        ({"a": f32(4, 8)}, b"x" * 8),  # starts late
        ({"a": f32(0, 8), "b": f32(0, 8)}, b"x" * 8),  # twice the same
        ({"a": f32(-4, 4)}, b"x" * 4),
        ({"a": f32(8, 0, [2])}, b"x" * 8),  # backwards
        ({"a": f32(0, 8, [3])}, b"x" * 8),  # shape says 12
        ({"a": f32(0, 8, [-1, -2])}, b"x" * 8),
        ({"a": {**f32(0, 8), "dtype": "F33"}}, b"x" * 8),
        ({"a": {**f32(0, 8), "dtype": ["F32"]}}, b"x" * 8),
        ({"a": {**f32(0, 8), "shape": "2"}}, b"x" * 8),
        ({"a": {**f32(0, 8), "shape": None}}, b"x" * 8),
        ({"a": {**f32(0, 8), "data_offsets": [0]}}, b"x" * 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8),
        ({"a": 3}, b""),
        ([], b""),
        (3, b""),
        (b"", b""),
        (b"{", b""),
        (b"\xff\xfe garbage", b""),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, NaN]}}', b""),
        (b"[" * 200_000, b""),  # deeper than a parser's stack
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header, data):
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        read_header(write(tmp_path / "bad.safetensors", header, data))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 1000])
def test_a_header_said_to_be_longer_than_the_file_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 10)
    with pytest.raises(ModelError, match=f"a header of {length} bytes"):
        read_header(path)


def join(path, names):
    """A slice as one piece."""
    head, ranges = sliced(path, names)
    data = path.read_bytes()
    return head + b"".join(data[r.start : r.start + r.num_bytes] for r in ranges)


@pytest.mark.parametrize(
    "names", [["b"], ["a", "b"], ["large", "scalar"], ["empty"], list(TENSORS), []]
)
def test_a_slice_is_a_safetensors_file_with_the_same_values(path, names):
    found = load(join(path, names))
    assert found.keys() == set(names)
    for name in names:
        np.testing.assert_array_equal(found[name], TENSORS[name], strict=True)


def test_the_data_of_a_slice_is_aligned_as_the_format_asks(path):
    data = join(path, ["b", "large"])
    assert (8 + struct.unpack("<Q", data[:8])[0]) % 8 == 0


def test_tensors_that_follow_each_other_are_one_range(path):
    _, ranges = sliced(path, list(TENSORS))
    assert len(ranges) == 1
    order = sorted(TENSORS, key=lambda name: read_header(path)[name].place.start)
    _, apart = sliced(path, order[::2])
    assert len(apart) > 1


def test_a_tensor_that_is_not_there_is_an_error(path):
    with pytest.raises(KeyError, match="nope"):
        sliced(path, ["a", "nope"])

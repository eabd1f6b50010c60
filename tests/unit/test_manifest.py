import pytest

from fedpruner_common.manifest import ITEM_BYTES, TensorInfo


def test_a_tensors_bytes_are_its_elements_times_their_size():
    assert TensorInfo("w", "BF16", (3, 5), 30, "").num_bytes == 30  # 15 elements of 2 bytes
    assert TensorInfo("scalar", "F32", (), 4, "").shape == ()
    assert TensorInfo("empty", "F32", (0, 7), 0, "").num_bytes == 0


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_a_wrong_length_is_refused_for_every_dtype(dtype):
    with pytest.raises(ValueError, match=r"tensor w: .* of shape \[2\] is not 3 bytes"):
        TensorInfo("w", dtype, (2,), 3, "")


@pytest.mark.parametrize("dtype", ["", "float32", "F8_E4M3", "f32"])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="tensor w: unknown dtype"):
        TensorInfo("w", dtype, (1,), 1, "")


def test_a_tensor_with_negative_sides_is_refused():
    with pytest.raises(ValueError, match="tensor w"):
        TensorInfo("w", "F32", (-2, -3), 24, "")  # the product alone would fit

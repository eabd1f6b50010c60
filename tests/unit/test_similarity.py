import numpy as np
import pytest

from fedpruner_common.similarity import CkaAccumulator, gram, hsic1


def graph(*edges, diagonal=0.0):
    """A symmetric 4 x 4 matrix with ones at these places."""
    matrix = np.diag(np.full(4, diagonal))
    for i, j in edges:
        matrix[i, j] = matrix[j, i] = 1.0
    return matrix


PAIRS = graph((0, 1), (2, 3))
CROSSED = graph((0, 2), (1, 3))


def cka(*batches):
    """CKA of the first two items over minibatches of Gram matrices."""
    accumulator = CkaAccumulator(len(batches[0]))
    for grams in batches:
        accumulator.add(list(grams))
    return accumulator.matrix()


def test_hsic_of_a_matrix_with_itself_is_as_worked_out_by_hand():
    # n = 4. tr(KK) = 4 ones = 4; sum(K)^2 / (3 * 2) = 16 / 6; row sums are all 1, so the cross
    # term is 2 / 2 * 4 = 4. (4 + 16/6 - 4) / (4 * 1) = 2/3
    assert hsic1(PAIRS, PAIRS) == pytest.approx(2 / 3, abs=1e-15)


def test_hsic_of_two_matrices_is_as_worked_out_by_hand():
    # tr(KL) = 0; 16 / 6; cross 4: (0 + 16/6 - 4) / 4 = -1/3
    assert hsic1(PAIRS, CROSSED) == pytest.approx(-1 / 3, abs=1e-15)
    # L adds the edge 0-2 to K. tr(KL) = 4; 4 * 6 / 6 = 4; L's row sums 2 1 2 1, times 1, sum to 6,
    # so cross = 6: (4 + 4 - 6) / 4 = 1/2
    assert hsic1(PAIRS, graph((0, 1), (2, 3), (0, 2))) == pytest.approx(0.5, abs=1e-15)


def test_hsic_does_not_look_at_the_diagonal():
    assert hsic1(PAIRS + 7 * np.eye(4), CROSSED - 3 * np.eye(4)) == hsic1(PAIRS, CROSSED)


def test_hsic_leaves_its_arguments_alone():
    matrix = graph((0, 1), diagonal=5.0)
    hsic1(matrix, matrix)
    assert np.diag(matrix).tolist() == [5.0] * 4


@pytest.mark.parametrize("shapes", [(3, 3), (4, 5)])
def test_hsic_needs_two_equal_shapes_of_at_least_four(shapes):
    with pytest.raises(ValueError, match="at least 4"):
        hsic1(np.eye(shapes[0]), np.eye(shapes[1]))


def test_gram_scales_every_token_to_unit_root_mean_square():
    features = np.array([[3.0, -4.0], [300.0, 400.0]], dtype=np.float32)
    # Rows divided by sqrt(12.5) and sqrt(125000): both have squared norm 2 then. Their product:
    # (3 * 300 - 4 * 400) / (sqrt(12.5) * sqrt(125000)) = -700 / 1250 = -0.56
    np.testing.assert_allclose(gram(features), [[2.0, -0.56], [-0.56, 2.0]], atol=1e-5)


def test_gram_of_a_token_that_is_all_zero_is_finite():
    assert np.isfinite(gram(np.zeros((5, 3), dtype=np.float32))).all()


def test_a_layer_is_fully_similar_to_itself():
    rng = np.random.default_rng(0)
    k = gram(rng.normal(size=(32, 8)))
    assert cka([k, k])[0, 1] == pytest.approx(1.0, abs=1e-12)


def test_rotating_and_scaling_a_layers_output_does_not_change_its_similarity():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 64, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    plain = cka([gram(x), gram(x + y)])[0, 1]
    assert 0.1 < plain < 0.9
    assert cka([gram(5 * x @ rotation), gram(x + y)])[0, 1] == pytest.approx(plain, abs=1e-5)
    assert cka([9 * gram(x), 0.1 * gram(x + y)])[0, 1] == pytest.approx(plain, abs=1e-12)


def test_the_hsic_of_unrelated_data_is_zero_in_the_mean():
    rng = np.random.default_rng(2)
    values, scale = [], []
    for _ in range(400):
        k, l = gram(rng.normal(size=(24, 6))), gram(rng.normal(size=(24, 6)))  # noqa: E741
        values.append(hsic1(k, l))
        scale.append(hsic1(k, k))
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * standard_error
    assert standard_error < 0.01 * np.mean(scale)


def test_minibatches_are_averaged_before_dividing():
    # PAIRS with PAIRS: 2/3 each. PAIRS with CROSSED: -1/3. Two batches: first item PAIRS twice, the
    # second PAIRS then CROSSED: (2/3 - 1/3) / sqrt(4/3 * 4/3) = 1/4; the mean of ratios is 1/4 too
    # only with equal scales, so the second batch is twice as large: its HSIC counts 4 times.
    # (2/3 - 4/3) < 0 -> 0, while the mean of the ratios 1 and -1/2 would be 1/4.
    assert cka([PAIRS, PAIRS], [PAIRS, CROSSED])[0, 1] == pytest.approx(0.25)
    assert cka([PAIRS, PAIRS], [2 * PAIRS, 2 * CROSSED])[0, 1] == 0.0


def test_the_matrix_is_symmetric_within_zero_and_one_and_has_ones_on_its_diagonal():
    rng = np.random.default_rng(3)
    for _ in range(20):
        similarity = cka([gram(rng.normal(size=(5, 3))) for _ in range(4)])
        np.testing.assert_array_equal(similarity, similarity.T)
        assert similarity.min() >= 0.0
        assert similarity.max() <= 1.0
        assert np.diag(similarity).tolist() == [1.0] * 4


def test_layers_that_never_vary_give_a_finite_matrix():
    constant = np.ones((6, 6))
    assert np.isfinite(cka([constant, constant])).all()

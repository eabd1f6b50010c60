import numpy as np
import pytest

from fedpruner_server.core.grouping import spectral_groups


def blocks(*groups, inside=0.9, outside=0.0):
    """A similarity matrix in which items of the same group are alike."""
    n = sum(len(group) for group in groups)
    matrix = np.full((n, n), outside)
    for group in groups:
        matrix[np.ix_(group, group)] = inside
    np.fill_diagonal(matrix, 1.0)
    return matrix


@pytest.mark.parametrize("outside", [0.0, 0.1])
def test_a_block_diagonal_similarity_gives_its_blocks(outside):
    similarity = blocks([0, 1, 2], [3, 4], [5, 6, 7], outside=outside)
    assert spectral_groups(similarity, 3, seed=0).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_groups_need_not_be_neighbours():
    similarity = blocks([0, 3, 4], [1, 2, 5])
    assert spectral_groups(similarity, 2, seed=0).tolist() == [0, 1, 1, 0, 0, 1]


def test_labels_are_ordered_by_their_first_item():
    rng = np.random.default_rng(0)
    for seed in range(5):
        raw = rng.uniform(size=(9, 9))
        labels = spectral_groups((raw + raw.T) / 2, 4, seed=seed).tolist()
        firsts = [labels.index(label) for label in range(4)]
        assert firsts == sorted(firsts)


def test_as_many_groups_as_items_are_singletons():
    assert spectral_groups(blocks([0, 1, 2], [3, 4]), 5, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_one_group_holds_everything():
    assert spectral_groups(blocks([0, 1, 2], [3, 4]), 1, seed=0).tolist() == [0] * 5


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_identical_items_still_give_as_many_groups_as_asked_for(value, num_groups):
    similarity = np.full((6, 6), value)
    assert set(spectral_groups(similarity, num_groups, seed=0)) == set(range(num_groups))


def test_every_number_of_groups_is_filled_for_any_similarity():
    rng = np.random.default_rng(1)
    for _ in range(4):
        raw = rng.uniform(size=(7, 7))
        for num_groups in (2, 4, 6):
            labels = spectral_groups((raw + raw.T) / 2, num_groups, seed=0)
            assert set(labels) == set(range(num_groups))


@pytest.mark.parametrize("num_groups", [0, -1, 4])
def test_a_number_of_groups_that_cannot_be_is_refused(num_groups):
    with pytest.raises(ValueError, match=f"cannot make {num_groups} groups of 3 items"):
        spectral_groups(np.eye(3), num_groups, seed=0)


def test_the_diagonal_does_not_matter_and_the_argument_is_left_alone():
    similarity = blocks([0, 3], [1, 2])
    other = similarity.copy()
    np.fill_diagonal(other, -5.0)
    before = other.copy()
    labels = spectral_groups(other, 2, seed=0)
    assert labels.tolist() == spectral_groups(similarity, 2, seed=0).tolist()
    np.testing.assert_array_equal(other, before)


def test_the_same_seed_gives_the_same_groups():
    raw = np.random.default_rng(2).uniform(size=(12, 12))
    similarity = (raw + raw.T) / 2
    first = spectral_groups(similarity, 5, seed=3).tolist()
    assert spectral_groups(similarity, 5, seed=3).tolist() == first

from itertools import combinations, product

import numpy as np
import pytest

from fedpruner_server.core.grouping import Grouping, group, spectral_groups

KINDS = list(Grouping)


def blocks(*groups, inside=0.9, outside=0.0):
    """A similarity matrix in which items of the same group are alike."""
    n = sum(len(members) for members in groups)
    matrix = np.full((n, n), outside)
    for members in groups:
        matrix[np.ix_(members, members)] = inside
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


def random_similarity(seed, n):
    raw = np.random.default_rng(seed).uniform(size=(n, n))
    return (raw + raw.T) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_groups_as_items_are_singletons_whatever_the_kind(kind):
    labels = group(random_similarity(0, 5), 5, kind=kind, seed=3)
    assert labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Grouping.NONE])
def test_every_kind_fills_its_groups_and_orders_them_by_their_first_item(kind):
    for n, num_groups in ((7, 1), (7, 2), (7, 4), (7, 6)):
        labels = group(random_similarity(n, n), num_groups, kind=kind, seed=1).tolist()
        assert list(dict.fromkeys(labels)) == list(range(num_groups))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_groups", [0, 4])
def test_no_kind_makes_a_number_of_groups_that_cannot_be(kind, num_groups):
    with pytest.raises(ValueError, match=f"cannot make {num_groups} groups of 3 items"):
        group(np.eye(3), num_groups, kind=kind, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_looks_at_the_diagonal_or_changes_its_argument(kind):
    similarity = random_similarity(4, 6)
    other = similarity.copy()
    np.fill_diagonal(other, -5.0)
    before = other.copy()
    labels = group(other, 3, kind=kind, seed=0).tolist()
    assert labels == group(similarity, 3, kind=kind, seed=0).tolist()
    np.testing.assert_array_equal(other, before)


def test_spectral_groups_are_those_of_the_paper():
    similarity = random_similarity(5, 9)
    labels = group(similarity, 4, kind=Grouping.SPECTRAL, seed=2).tolist()
    assert labels == spectral_groups(similarity, 4, seed=2).tolist()


def test_without_groups_everything_is_in_one():
    assert group(np.eye(4), 3, kind=Grouping.NONE, seed=0).tolist() == [0, 0, 0, 0]


def test_even_groups_are_neighbours_in_equal_parts():
    # 2 i // 5 and 3 i // 7 by hand
    assert group(np.eye(5), 2, kind=Grouping.EVEN, seed=0).tolist() == [0, 0, 0, 1, 1]
    assert group(np.eye(7), 3, kind=Grouping.EVEN, seed=0).tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_random_groups_depend_on_the_seed_alone():
    def labels(similarity, seed):
        return tuple(group(similarity, 3, kind=Grouping.RANDOM, seed=seed).tolist())

    assert labels(random_similarity(0, 9), 1) == labels(random_similarity(1, 9), 1)
    assert len({labels(np.eye(9), seed) for seed in range(20)}) > 10


def test_random_groups_treat_all_items_alike():
    # Items 0 and 1 share a group as often as items 3 and 7 do.
    labels = np.array([group(np.eye(8), 3, kind=Grouping.RANDOM, seed=s) for s in range(1500)])
    together = [(labels[:, i] == labels[:, j]).mean() for i, j in combinations(range(8), 2)]
    # the standard deviation of each share is at most sqrt(0.25 / 1500) = 0.013
    assert max(together) - min(together) < 8 * 0.013


def all_splits(n, num_groups):
    """Every way to cut n items in a row into so many runs."""
    for borders in combinations(range(1, n), num_groups - 1):
        edges = [0, *borders, n]
        yield [label for label in range(num_groups) for _ in range(edges[label], edges[label + 1])]


def dissimilarity(similarity, labels):
    """Each item's mean dissimilarity to the items of its group, itself included, summed."""
    total = 0.0
    for i, j in product(range(len(labels)), repeat=2):
        if i != j and labels[i] == labels[j]:
            total += (1 - similarity[i, j]) / labels.count(labels[i])
    return total


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_contiguous_groups_are_the_best_of_all_splits(n):
    for seed in range(5):
        similarity = random_similarity(seed, n)
        for num_groups in range(1, n + 1):
            best = min(
                all_splits(n, num_groups), key=lambda labels: dissimilarity(similarity, labels)
            )
            found = group(similarity, num_groups, kind=Grouping.CONTIGUOUS, seed=0)
            assert found.tolist() == best


def test_contiguous_groups_are_neighbours_even_where_others_are_more_alike():
    similarity = blocks([0, 1, 5], [2, 3, 4])
    found = group(similarity, 3, kind=Grouping.CONTIGUOUS, seed=0)
    assert found.tolist() == [0, 0, 1, 1, 1, 2]


def scatter(points, labels):
    """What k-means minimises: squared distances to the centre of one's group."""
    total = 0.0
    for label in set(labels):
        members = points[np.array(labels) == label]
        total += float(((members - members.mean(axis=0)) ** 2).sum())
    return total


@pytest.mark.parametrize("num_groups", [2, 3])
def test_normalised_spectral_groups_are_k_means_of_unit_rows(num_groups):
    """Against all partitions of six items, tried one by one."""
    differs = False
    for seed in range(6):
        weights = random_similarity(seed, 6)
        np.fill_diagonal(weights, 0.0)
        root = np.sqrt(weights.sum(axis=1))
        _, vectors = np.linalg.eigh(np.eye(6) - weights / np.outer(root, root))
        points = vectors[:, :num_groups]
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
        partitions = [
            labels
            for labels in product(range(num_groups), repeat=6)
            if list(dict.fromkeys(labels)) == list(range(num_groups))
        ]
        best = min(partitions, key=lambda labels: scatter(points, labels))
        found = group(weights, num_groups, kind=Grouping.SPECTRAL_NORMALIZED, seed=0).tolist()
        assert found == list(best)
        differs |= found != spectral_groups(weights, num_groups, seed=0).tolist()
    assert differs

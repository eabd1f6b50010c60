import pytest

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.submodel import Submodel

A0, F0 = ComponentId(0, Kind.ATTENTION), ComponentId(0, Kind.FFN)
A1, F1 = ComponentId(1, Kind.ATTENTION), ComponentId(1, Kind.FFN)
A2, F2 = ComponentId(2, Kind.ATTENTION), ComponentId(2, Kind.FFN)


def test_a_submodel_keeps_the_order_of_the_forward_pass_whatever_order_it_is_given():
    assert Submodel.of(3, [F2, A0, F2, F0]).components == (A0, F0, F2)


@pytest.mark.parametrize("components", [(F0, A0), (A0, A0)])
def test_unsorted_or_repeated_components_are_refused(components):
    with pytest.raises(ValueError, match="sorted and unique"):
        Submodel(3, components)


@pytest.mark.parametrize("layer", [-1, 3, 4_000_000_000])
def test_a_layer_that_the_model_does_not_have_is_refused(layer):
    with pytest.raises(ValueError, match="outside the model's 3 layers"):
        Submodel.of(3, [A0, ComponentId(layer, Kind.FFN)])


def test_layers_keep_their_global_numbers():
    assert Submodel.of(3, [F0, A2, F2]).layers() == (0, 2)


def test_skipped_names_what_is_dropped_and_only_that():
    submodel = Submodel.of(4, [A0, F0, A1, F2])
    assert submodel.skipped() == {
        1: frozenset({Kind.FFN}),
        2: frozenset({Kind.ATTENTION}),
        3: frozenset({Kind.ATTENTION, Kind.FFN}),
    }


def test_the_full_submodel_drops_nothing():
    full = Submodel.full(3)
    assert full.is_full
    assert full.skipped() == {}
    assert not Submodel.of(3, full.components[1:]).is_full


def test_the_picture_shows_each_layer_as_one_character():
    assert Submodel.of(4, [A0, F0, A1, F2]).picture() == "■▀▄·"


def test_dropped_runs_are_maximal_but_for_an_attention_whose_ffn_is_kept() -> None:
    def runs(picture: str) -> list[str]:
        kinds = {"■": [Kind.ATTENTION, Kind.FFN], "▀": [Kind.ATTENTION], "▄": [Kind.FFN], "·": []}
        kept = [ComponentId(i, kind) for i, c in enumerate(picture) for kind in kinds[c]]
        found = Submodel.of(len(picture), kept).dropped_runs()
        return [" ".join(f"{c.layer}{c.kind.value[0]}" for c in run) for run in found]

    assert runs("■■■") == []
    assert runs("■··■") == ["1a 1f 2a 2f"]
    assert runs("·■·") == ["0a 0f", "2a 2f"]
    assert runs("■▀▀■") == ["1f", "2f"]
    assert runs("■▀·■") == ["1f 2a 2f"]
    assert runs("■▀·▄■") == ["1f 2a 2f", "3a"]
    assert runs("▄▄") == ["0a", "1a"]
    assert runs("···") == ["0a 0f 1a 1f 2a 2f"]

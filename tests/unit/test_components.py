import pytest

from fedpruner_common.components import ComponentId, Kind, all_components


def test_components_order_by_depth_and_attention_before_ffn():
    mixed = [
        ComponentId(10, Kind.ATTENTION),
        ComponentId(2, Kind.FFN),
        ComponentId(2, Kind.ATTENTION),
    ]
    assert [str(c) for c in sorted(mixed)] == ["2.attention", "2.ffn", "10.attention"]


def test_a_component_reads_back_what_it_wrote():
    for component in all_components(12):
        assert ComponentId.parse(str(component)) == component


@pytest.mark.parametrize("text", ["", "3", "3.", "3.mlp", "x.ffn", ".ffn", "3.ffn.4"])
def test_a_text_that_names_no_component_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - int and Enum word it differently
        ComponentId.parse(text)


def test_a_model_has_two_components_a_layer_in_the_order_of_its_forward_pass():
    assert [str(c) for c in all_components(2)] == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    assert all_components(0) == ()

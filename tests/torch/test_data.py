"""Local text becomes token sequences; ids by hand, since the tokenizer is one token a character."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_support import BOS, EOS, PAD, ids_of, make_tokenizer

from fedpruner_common.errors import DataError, ModelError
from fedpruner_common.modeling.data import (
    IGNORED,
    TokenSequence,
    collate,
    load_sequences,
    load_tokenizer,
    pad_token_id,
)

TOKENIZER = make_tokenizer()
CHAT = make_tokenizer(
    chat_template=(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
)


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, length: int = 64, tokenizer: Any = TOKENIZER) -> list[TokenSequence]:
    return load_sequences([path], tokenizer, max_seq_length=length)


def ids(sequence: TokenSequence) -> list[int]:
    return sequence.input_ids.tolist()


def labels(sequence: TokenSequence) -> list[int]:
    return sequence.labels.tolist()


# Text


def test_texts_are_joined_with_an_end_token_and_cut_into_full_windows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "abcde"}, {"text": "fg"}, {"text": "hij"})
    a, b, c = load(path, 5)
    assert [ids(s) for s in (a, b, c)] == [
        ids_of("abcde"),
        [EOS, *ids_of("fg"), EOS, *ids_of("h")],
        [*ids_of("ij"), EOS],
    ]
    assert all(labels(s) == ids(s) for s in (a, b, c))


@pytest.mark.parametrize("length", [2, 3, 7, 50, 1000])
def test_packing_loses_no_token_and_only_the_last_window_is_short(
    tmp_path: Path, length: int
) -> None:
    texts = ["word " * n for n in range(1, 9)]
    sequences = load(write_rows(tmp_path / "a.jsonl", *({"text": t} for t in texts)), length)
    expected = [token for text in texts for token in [*ids_of(text), EOS]]
    assert len(expected) % length != 1  # a last window of one token has nothing to predict
    assert [token for s in sequences for token in ids(s)] == expected
    assert {len(s.input_ids) for s in sequences[:-1]} <= {length}
    assert len(sequences[-1].input_ids) <= length


def test_a_tokenizer_without_an_end_token_joins_texts_directly(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "cd"})
    (only,) = load(path, 8, make_tokenizer(eos=False))
    assert ids(only) == ids_of("abcd")


def test_a_file_of_another_suffix_is_one_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": 1}\nx')
    (only,) = load(path)
    assert ids(only) == [*ids_of('{"text": 1}\nx'), EOS]


def test_a_folder_is_its_jsonl_and_txt_files_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    write_rows(tmp_path / "a.jsonl", {"text": "one"})
    (tmp_path / "c.csv").write_text("never")
    (only,) = load(tmp_path)
    assert ids(only) == [*ids_of("one"), EOS, *ids_of("two"), EOS]


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "ab"}\n   \n')
    (only,) = load(path)
    assert ids(only) == [*ids_of("ab"), EOS]


# Instructions


def test_an_instruction_has_loss_on_its_output_only(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"instruction": "add", "output": "yes"})
    (only,) = load(path, 200)
    prompt = [BOS, *ids_of("### Instruction:\nadd\n\n### Response:\n")]
    answer = [*ids_of("yes"), EOS]
    assert ids(only) == prompt + answer
    assert labels(only) == [IGNORED] * len(prompt) + answer


def test_an_input_stands_between_instruction_and_response(tmp_path: Path) -> None:
    rows = {"instruction": "{add}", "input": "1 2", "output": "3"}
    (only,) = load(
        write_rows(tmp_path / "a.jsonl", rows), 200, make_tokenizer(eos=False, bos=False)
    )
    prompt = ids_of("### Instruction:\n{add}\n\n### Input:\n1 2\n\n### Response:\n")
    assert ids(only) == [*prompt, *ids_of("3")]
    assert labels(only) == [IGNORED] * len(prompt) + ids_of("3")


def test_a_long_example_is_cut_at_the_end(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"instruction": "add", "output": "y" * 50})
    prompt = [BOS, *ids_of("### Instruction:\nadd\n\n### Response:\n")]
    (only,) = load(path, len(prompt) + 3)
    assert ids(only) == prompt + ids_of("yyy")
    assert labels(only) == [IGNORED] * len(prompt) + ids_of("yyy")


def test_an_example_whose_answer_is_cut_off_is_left_out(tmp_path: Path) -> None:
    short, long = {"instruction": "a", "output": "b"}, {"instruction": "a" * 40, "output": "b"}
    assert len(load(write_rows(tmp_path / "a.jsonl", short, long), 45)) == 1
    with pytest.raises(DataError, match="nothing to train on"):
        load(write_rows(tmp_path / "b.jsonl", long), 45)


# Conversations


def test_a_conversation_has_loss_on_the_assistants_turns_only(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok"},
    ]
    (only,) = load(write_rows(tmp_path / "a.jsonl", {"messages": messages}), 200, CHAT)
    before, between = "[system]be;[user]hi;[assistant]", "[user]more;[assistant]"
    assert ids(only) == ids_of(f"{before}yo;{between}ok;")
    assert labels(only) == [
        *[IGNORED] * len(before), *ids_of("yo;"), *[IGNORED] * len(between), *ids_of("ok;"),
    ]  # fmt: skip


def test_messages_without_a_chat_template_name_file_and_line(tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": "yo"}]
    path = write_rows(tmp_path / "a.jsonl", {"text": "x"}, {"messages": messages})
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*chat template"):
        load(path)


@pytest.mark.parametrize("messages", [["hi"], [{"content": "x"}], [{"role": "tool"}]])
def test_messages_that_the_template_refuses_name_file_and_line(
    tmp_path: Path, messages: list[Any]
) -> None:
    strict = make_tokenizer(
        chat_template=(
            "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
            "{{ raise_exception('unknown role') }}{% endif %}{{ m['content'] }}{% endfor %}"
        )
    )
    path = write_rows(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(DataError, match=r"a\.jsonl, line 1"):
        load(path, 64, strict)


# What cannot be used


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("{'text': 1}", id="not JSON"),
        pytest.param('{"text": "a"', id="cut off"),
        pytest.param("[1]", id="not an object"),
        pytest.param('"text"', id="a string"),
        pytest.param('{"txt": "a"}', id="wrong key"),
        pytest.param('{"text": 5}', id="text is a number"),
        pytest.param('{"instruction": "a"}', id="no output"),
        pytest.param('{"instruction": "a", "output": null}', id="output is null"),
        pytest.param('{"messages": "hi"}', id="messages is a string"),
        pytest.param('{"text": ' + "1" * 5000 + "}", id="a number of 5000 digits"),
        pytest.param('{"text": "a\\ud800b"}', id="half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl, line 3"):
        load(path)


def test_a_line_with_wrong_keys_is_told_which_keys_it_has(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"\['answer', 'question'\]"):
        load(path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_a_file_with_nothing_in_it_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "void.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"nothing to train on in .*void\.jsonl"):
        load(path, tokenizer=make_tokenizer(eos=False))


def test_a_missing_file_an_empty_folder_and_bytes_that_are_no_text_are_data_errors(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.jsonl"):
        load(tmp_path / "gone.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is a folder without"):
        load(tmp_path / "empty")
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\xff")
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            load(tmp_path / name)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_survives_the_way_through_its_folder(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a b\n", add_special_tokens=False)["input_ids"] == ids_of("a b\n")


# Batches


def test_collate_pads_at_the_end_and_masks_the_padding() -> None:
    sequences = [TokenSequence.of([5, 6, 7], [IGNORED, 6, 7]), TokenSequence.of([8], [8])]
    batch = collate(sequences, pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.long


def test_a_batch_of_equal_lengths_has_no_mask() -> None:
    batch = collate([TokenSequence.of([5, 6], [5, 6])] * 2, pad_token_id=0)
    assert batch.attention_mask is None
    assert set(batch.arguments(torch.device("cpu"))) == {"input_ids", "labels"}


def test_num_tokens_counts_predictions_with_loss() -> None:
    # Of 3 labels the first is never predicted; of [-100, 6, 7] two are; a single token has none.
    whole, answer = (
        TokenSequence.of([5, 6, 7], [5, 6, 7]),
        TokenSequence.of([5, 6, 7], [IGNORED, 6, 7]),
    )
    single = TokenSequence.of([5], [5])
    last = TokenSequence.of([5, 6, 7], [IGNORED, IGNORED, 7])
    counts = [collate([s], pad_token_id=0).num_tokens for s in (whole, answer, single, last)]
    assert counts == [2, 2, 0, 1]
    assert collate([whole, answer, single, last], pad_token_id=0).num_tokens == 5


def test_padding_uses_the_pad_token_or_else_the_end_token_or_else_anything() -> None:
    assert pad_token_id(make_tokenizer()) == PAD
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == EOS
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0

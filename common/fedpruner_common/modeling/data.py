"""Local text -> token sequences with labels, for training, calibration and evaluation.

One JSON object a line, one of:

    {"text": ...}                                      loss on everything
    {"instruction": ..., "input": ..., "output": ...}  loss on the output only
    {"messages": [{"role": ..., "content": ...}]}      loss on the assistant's turns only

A file that does not end in .jsonl is one plain text.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedpruner_common.errors import DataError, ModelError

IGNORED = -100  # the label that transformers' losses skip
_PIECE_CHARACTERS = 1 << 16
_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
_PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True)
class TokenSequence:
    """One training example after tokenization.

    Attributes:
        input_ids: at most max_seq_length tokens, int32; as tensors, because lists of Python numbers
            take ten times the memory.
        labels: as long; IGNORED where there is no loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, input_ids: list[int], labels: list[int]) -> "TokenSequence":
        """From plain numbers."""
        ids = torch.tensor(input_ids, dtype=torch.int32)
        return cls(ids, torch.tensor(labels, dtype=torch.int32))


@dataclass(frozen=True)
class Batch:
    """Sequences stacked for one forward pass.

    Attributes:
        input_ids, labels: (batch, seq_len).
        attention_mask: of the same shape, 1 on real tokens; None when nothing is padded.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        """Tokens with loss; the first of a sequence has no prediction."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's forward.

        Without the mask: padding is at the end and attention is causal, so no real token ever sees
        it, and padding itself has no loss. A mask would be converted and saved in every layer.
        """
        return {"input_ids": self.input_ids.to(device), "labels": self.labels.to(device)}


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; never runs code from it.

    Raises:
        ModelError: there is none that can be used.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises anything here
        raise ModelError(f"no usable tokenizer in {model_dir}: {error}") from error
    return tokenizer


def load_sequences(
    paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int
) -> list[TokenSequence]:
    """All sequences of some files.

    Texts are joined, each followed by the end-of-sequence token, and cut into windows, so that no
    token is lost and nearly every window is full. Examples with an answer are cut at the end.

    Raises:
        DataError: a file cannot be read, a line is malformed, or nothing is left to train on.
    """
    paths = list(paths)
    texts: list[str] = []
    sequences: list[TokenSequence] = []
    for path in paths:
        for place, row in _rows(path):
            if isinstance(row.get("text"), str):
                texts.append(row["text"])
            else:
                ids, labels = _with_answer(row, tokenizer, place)
                if any(label != IGNORED for label in labels[1:max_seq_length]):
                    cut = TokenSequence.of(ids[:max_seq_length], labels[:max_seq_length])
                    sequences.append(cut)
    sequences.extend(_windows(texts, tokenizer, max_seq_length))
    if not sequences:
        names = ", ".join(str(path) for path in paths)
        raise DataError(
            f"nothing to train on in {names}: no text of at least two tokens, and no answer "
            f"within the first {max_seq_length} tokens of its example"
        )
    return sequences


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file with the place to name in an error."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".txt"))
        if not files:
            raise DataError(f"{path} is a folder without .jsonl or .txt files")
        for file in files:
            yield from _rows(file)
        return
    try:
        if path.suffix != ".jsonl":
            yield str(path), {"text": path.read_text(encoding="utf-8")}
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                    if "\\ud" in line.lower():  # perhaps half a surrogate pair, which is no text
                        json.dumps(row, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:  # also huge numbers, half characters
                    raise DataError(f"{place}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}")
                yield place, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _with_answer(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row with an answer, uncut."""
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        template = _PROMPT_WITH_INPUT if row.get("input") else _PROMPT
        prompt = _encode(template.format(**row), tokenizer)
        if tokenizer.bos_token_id is not None:
            prompt = [tokenizer.bos_token_id, *prompt]
        answer = _encode(row["output"], tokenizer)
        if tokenizer.eos_token_id is not None:
            answer.append(tokenizer.eos_token_id)
        return prompt + answer, [IGNORED] * len(prompt) + answer
    if isinstance(row.get("messages"), list):
        return _conversation(row["messages"], tokenizer, place)
    raise DataError(
        f"{place}: expected 'text', 'instruction' with 'output', or 'messages'; "
        f"got keys {sorted(row)[:8]}"
    )


def _conversation(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation through the tokenizer's own template."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: 'messages' need a tokenizer with a chat template; this one has none"
        )

    def render(turns: list[Any], *, ask: bool) -> list[int]:
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # templates raise anything, jinja errors among them
            raise DataError(
                f"{place}: the chat template refuses these messages: {error}"
            ) from error
        return _encode(str(text), tokenizer)

    ids = render(messages, ask=False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        start = _common_prefix(render(messages[:index], ask=True), ids)
        end = _common_prefix(render(messages[: index + 1], ask=False), ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def _common_prefix(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> Iterator[TokenSequence]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    waiting: list[int] = []
    for text in texts:
        for piece in _pieces(text):
            waiting += _encode(piece, tokenizer)
        waiting += end
        whole = len(waiting) // max_seq_length * max_seq_length
        for start in range(0, whole, max_seq_length):
            window = waiting[start : start + max_seq_length]
            yield TokenSequence.of(window, window)
        del waiting[:whole]
    if len(waiting) >= 2:
        yield TokenSequence.of(waiting, waiting)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that end at line ends: a tokenizer needs a hundred times its input."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        end = end or start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def collate(sequences: list[TokenSequence], *, pad_token_id: int) -> Batch:
    """Stack sequences, padded at the end to the longest."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.long)
    labels = torch.full((len(sequences), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        ids[row, :length] = sequence.input_ids
        labels[row, :length] = sequence.labels
        mask[row, :length] = 1
    return Batch(ids, labels, None if bool(mask.all()) else mask)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with; any will do, padding has neither attention nor loss."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0

"""The base model as content-addressed blobs: byte ranges straight from its safetensors shards.

Reads headers only; the weights are read when an agent asks for them, a chunk at a time, so memory
does not depend on the size of the model. No torch.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from fedpruner_common.chunks import CHUNK_BYTES, FileRange, hash_file
from fedpruner_common.errors import ModelError, NotFound
from fedpruner_common.manifest import FileInfo
from fedpruner_server.tensorfile import LocatedTensor, read_header

# What an agent needs beside the weights, as far as the model has it.
_MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


class BlockStore:
    """The blobs of one base model.

    Attributes:
        model_dir: the Hugging Face directory.
        tensors: name -> what it is.
        files: config and tokenizer.
    """

    def __init__(self, model_dir: Path, *, hash_cache: Path) -> None:
        """Read the headers and hash every tensor; hashes are cached by file size and time.

        Raises:
            ModelError: no usable safetensors checkpoint in the directory.
        """
        self.model_dir = model_dir
        located = _hashed(_locate_tensors(model_dir), hash_cache)
        self.tensors = {name: tensor.info for name, tensor in located.items()}
        self._places = {tensor.info.hash: tensor.place for tensor in located.values()}
        self.files = tuple(
            file_info(model_dir / n) for n in _MODEL_FILES if (model_dir / n).is_file()
        )
        for file in self.files:
            self._places[file.hash] = FileRange(model_dir / file.name, 0, file.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def add_file(self, info: FileInfo, path: Path) -> None:
        """Have a file that is not the base model's among the blobs."""
        self._places[info.hash] = FileRange(path, 0, info.num_bytes)

    def locate(self, content_hash: str) -> FileRange:
        """Where a blob's bytes are.

        Raises:
            NotFound: there is no such blob.
        """
        if content_hash not in self._places:
            raise NotFound(f"no blob {content_hash[:80]!r} in the base model")
        return self._places[content_hash]


def _locate_tensors(model_dir: Path) -> dict[str, LocatedTensor]:
    """Every tensor of the checkpoint, not hashed yet."""
    shards = sorted(model_dir.glob("*.safetensors"))
    index_path = model_dir / "model.safetensors.index.json"
    if index_path.is_file():
        try:
            names = sorted(set(json.loads(index_path.read_text())["weight_map"].values()))
            missing = [name for name in names if not (model_dir / name).is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index_path} is not a usable index: {error!r}") from error
        if missing:
            raise ModelError(
                f"{index_path} names shards that are not there: {', '.join(missing[:3])}"
            )
        shards = [model_dir / name for name in names]
    if not shards:
        hint = (
            " Its weights are in another format; convert them to safetensors first."
            if list(model_dir.glob("*.bin"))
            else ""
        )
        raise ModelError(f"{model_dir} has no *.safetensors weights.{hint}")
    return {name: tensor for shard in shards for name, tensor in read_header(shard).items()}


def _hashed(located: dict[str, LocatedTensor], cache_path: Path) -> dict[str, LocatedTensor]:
    """The same tensors with their hashes, from the cache where the shard has not changed."""
    shards = {tensor.place.path for tensor in located.values()}
    stamps = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(shards)}
    try:
        cached = json.loads(cache_path.read_text())
        known = cached["hashes"] if cached["stamps"] == stamps else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    hashes = {n: known.get(n) or _hash_range(tensor.place) for n, tensor in located.items()}
    if hashes != known:
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache_path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"stamps": stamps, "hashes": hashes}))
        os.replace(temporary, cache_path)
    return {
        name: replace(tensor, info=replace(tensor.info, hash=hashes[name]))
        for name, tensor in located.items()
    }


def _hash_range(place: FileRange) -> str:
    digest = blake3()
    with place.path.open("rb") as file:
        file.seek(place.start)
        left = place.num_bytes
        while left:
            data = file.read(min(CHUNK_BYTES, left))
            if not data:
                raise ModelError(f"{place.path} ended while it was read")
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def file_info(path: Path) -> FileInfo:
    return FileInfo(path.name, path.stat().st_size, hash_file(path))

import json
import os

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save_file

from fedpruner_common.errors import ModelError, NotFound
from fedpruner_server.blockstore import BlockStore, file_info

TENSORS = {
    "embed": np.arange(40, dtype=np.float32).reshape(8, 5),
    "layer.0": np.arange(300_000, dtype=np.float32),  # more than one chunk
    "norm": np.ones(5, dtype=np.float16),
}


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    (directory / "config.json").write_text('{"hidden_size": 5}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("not for agents")
    return directory


def open_store(model_dir):
    return BlockStore(model_dir, hash_cache=model_dir.parent / "state" / "hashes.json")


def read(store, content_hash):
    place = store.locate(content_hash)
    return place.path.read_bytes()[place.start : place.start + place.num_bytes]


def test_a_tensors_hash_is_the_blake3_of_its_bytes_and_finds_them(model_dir):
    store = open_store(model_dir)
    assert store.tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        info = store.tensors[name]
        assert info.hash == blake3(values.tobytes()).hexdigest()
        assert read(store, info.hash) == values.tobytes()
    assert store.num_bytes == 160 + 1_200_000 + 10  # 40 * 4, 300000 * 4, 5 * 2


def test_config_and_tokenizer_are_blobs_too_and_nothing_else_is(model_dir):
    store = open_store(model_dir)
    assert {file.name for file in store.files} == {"config.json", "tokenizer.json"}
    for file in store.files:
        assert read(store, file.hash) == (model_dir / file.name).read_bytes()


def test_a_hash_of_nothing_here_is_not_found(model_dir):
    store = open_store(model_dir)
    for content_hash in ("0" * 64, "", "../config.json"):
        with pytest.raises(NotFound):
            store.locate(content_hash)


def test_hashes_are_not_computed_again_while_the_shard_is_the_same(model_dir):
    before = open_store(model_dir).tensors
    shard = model_dir / "model.safetensors"
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # Size and time say that nothing changed, so the flipped bit is not looked at.
    assert open_store(model_dir).tensors == before


def test_a_changed_shard_is_hashed_again(model_dir):
    before = open_store(model_dir).tensors
    save_file({**TENSORS, "embed": TENSORS["embed"] + 1}, model_dir / "model.safetensors")
    os.utime(model_dir / "model.safetensors", ns=(1, 1))
    after = open_store(model_dir).tensors
    assert after["embed"].hash == blake3((TENSORS["embed"] + 1).tobytes()).hexdigest()
    assert after["embed"].hash != before["embed"].hash
    assert after["norm"].hash == before["norm"].hash


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"stamps": 1, "hashes": {}}'])
def test_a_broken_hash_cache_is_made_again(model_dir, text):
    expected = open_store(model_dir).tensors
    cache = model_dir.parent / "state" / "hashes.json"
    cache.write_text(text)
    assert open_store(model_dir).tensors == expected
    assert json.loads(cache.read_text())["hashes"]["norm"] == expected["norm"].hash


@pytest.fixture
def sharded_dir(tmp_path):
    directory = tmp_path / "sharded"
    directory.mkdir()
    shards = {
        "model-1-of-2.safetensors": ["embed"],
        "model-2-of-2.safetensors": ["layer.0", "norm"],
    }
    for shard, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_sharded_checkpoint_is_the_same_model(model_dir, sharded_dir):
    assert open_store(sharded_dir).tensors == open_store(model_dir).tensors


def test_shards_that_the_index_does_not_name_are_left_out(sharded_dir):
    save_file({"stray": np.ones(3)}, sharded_dir / "other.safetensors")
    assert "stray" not in open_store(sharded_dir).tensors


def test_a_missing_shard_is_named(sharded_dir):
    (sharded_dir / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"not there: model-2-of-2\.safetensors"):
        open_store(sharded_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_makes_no_sense_is_a_model_error(sharded_dir, text):
    (sharded_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        open_store(sharded_dir)


def test_weights_in_another_format_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="convert them to safetensors"):
        open_store(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights\.$"):
        open_store(tmp_path)


def test_a_broken_shard_is_refused_by_name(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a usable safetensors file"):
        open_store(model_dir)


def test_a_link_to_weights_that_are_not_there_is_a_model_error(model_dir):
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors").symlink_to(model_dir / "never-downloaded")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        open_store(model_dir)


def test_a_file_that_was_added_is_a_blob_like_the_others_but_not_of_the_model(model_dir, tmp_path):
    store = open_store(model_dir)
    path = tmp_path / "bridges.safetensors"
    path.write_bytes(b"bridges")
    info = file_info(path)
    assert (info.name, info.num_bytes) == ("bridges.safetensors", 7)
    with pytest.raises(NotFound):
        store.locate(info.hash)
    tensors, files, num_bytes = dict(store.tensors), store.files, store.num_bytes
    store.add_file(info, path)
    store.add_file(info, path)  # after a restart the journal says it once more
    assert read(store, info.hash) == b"bridges"
    assert (store.tensors, store.files, store.num_bytes) == (tensors, files, num_bytes)
    for file in files:
        assert read(store, file.hash) == (model_dir / file.name).read_bytes()

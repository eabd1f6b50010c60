import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_protobuf_code_is_what_the_generator_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.generate(tmp_path)
    made_dir = tmp_path / "fedpruner_common" / "pb"
    made = {path.name: path.read_bytes() for path in made_dir.iterdir()}
    committed_dir = ROOT / "common" / "fedpruner_common" / "pb"
    committed = {path.name: path.read_bytes() for path in committed_dir.glob("*_pb2*.py*")}
    assert made.keys() == committed.keys()
    for name, content in made.items():
        assert content == committed[name], f"{name} is stale: run proto/generate.py"

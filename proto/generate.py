"""The one way to make common/fedpruner_common/pb/ from proto/*.proto: `make proto`.

grpcio-tools is pinned low on purpose: code from 1.76.0 imports under protobuf 6.31 to 7.x, code
from newer generators refuses to import under protobuf 6.
"""

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).parent
PB_DIR = PROTO_DIR.parent / "common" / "fedpruner_common" / "pb"


def generate(output_dir: Path) -> None:
    """Write the generated modules under `output_dir`, as package fedpruner_common.pb."""
    include = resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-Ifedpruner_common/pb={PROTO_DIR}",
        f"-I{include}",
        f"--python_out={output_dir}",
        f"--pyi_out={output_dir}",
        f"--grpc_python_out={output_dir}",
        *(f"fedpruner_common/pb/{path.name}" for path in sorted(PROTO_DIR.glob("*.proto"))),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed; its message is above")


if __name__ == "__main__":
    generate(PB_DIR.parent.parent)

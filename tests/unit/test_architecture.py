"""Who may import whom, as a table; imports inside functions count."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [
    ROOT / "common" / "fedpruner_common",
    ROOT / "server" / "fedpruner_server",
    ROOT / "client" / "fedpruner_client",
    ROOT / "simulate" / "fedpruner_simulate",
]
TORCH = ("torch", "transformers", "peft", "accelerate")
TORCH_HOMES = (
    "fedpruner_common.modeling",
    "fedpruner_server.activations",
    "fedpruner_server.bridge",
    "fedpruner_server.describe",
    "fedpruner_server.probe",
    "fedpruner_server.model",
    "fedpruner_server.evaluate",
    "fedpruner_server.merge",
    "fedpruner_server.torch_jobs",
    "fedpruner_client.model",
    "fedpruner_client.sweep",
    "fedpruner_client.workshop",
    "fedpruner_client.train",
    "fedpruner_client.loss",
    "fedpruner_client.optimizer",
    "fedpruner_client.gpu",  # for its types only
    "fedpruner_client.memory",
    "fedpruner_client.train_jobs",
    "fedpruner_simulate.simulation",
)
PB = ("fedpruner_common.pb",)
PB_HOMES = (
    "fedpruner_common.pb",
    "fedpruner_common.convert",
    "fedpruner_common.convert_statistics",
    "fedpruner_common.wire",
    "fedpruner_server.servicer",
    "fedpruner_server.admin",
    "fedpruner_server.app",
    "fedpruner_client.connection",
    "fedpruner_client.transfers",
    "fedpruner_client.ctl",
)
CORE = ("fedpruner_server.core",)
# What core may know. A clock, the network, the disk, chance or a log would make replay differ.
CORE_MAY = (
    "fedpruner_server.core",
    "numpy",
    "sklearn",
    "collections",
    "dataclasses",
    "enum",
    "math",
    "typing",
    "zlib",
    "fedpruner_common.adapters",
    "fedpruner_common.budget",
    "fedpruner_common.components",
    "fedpruner_common.errors",
    "fedpruner_common.manifest",
    "fedpruner_common.similarity",
    "fedpruner_common.spec",
    "fedpruner_common.statistics",
    "fedpruner_common.submodel",
    "fedpruner_common.task",
    "fedpruner_common.units",
)
# (whose imports, what they may not name, who is excepted)
EVERYONE = ("fedpruner_common", "fedpruner_server", "fedpruner_client", "fedpruner_simulate")
FORBIDDEN = [
    (("fedpruner_common", "fedpruner_server", "fedpruner_client"), ("fedpruner_simulate",), ()),
    (("fedpruner_common",), ("fedpruner_server", "fedpruner_client"), ()),
    (("fedpruner_server",), ("fedpruner_client",), ()),
    (("fedpruner_client",), ("fedpruner_server",), ()),
    (EVERYONE, TORCH, TORCH_HOMES),
    (EVERYONE, PB, PB_HOMES),
]


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(path.parents[len(path.parts) - len(ROOT.parts) - 2]).parts)
    parts[-1] = parts[-1].removesuffix(".py")
    return ".".join(parts if parts[-1] != "__init__" else parts[:-1])


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            # `from package import module` names the module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def all_imports() -> list[tuple[Path, str, str]]:
    found = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            tree = ast.parse(path.read_text())
            found.extend(
                (path.relative_to(ROOT), module_name(path), name) for name in imports(tree)
            )
    return found


def test_the_table_sees_imports_in_functions_and_of_modules_from_packages():
    source = "def f():\n    import torch.nn\n    from fedpruner_common import pb\n"
    assert list(imports(ast.parse(source))) == ["torch.nn", "fedpruner_common.pb"]
    assert module_name(PACKAGES[1] / "core" / "round.py") == "fedpruner_server.core.round"
    assert len(all_imports()) > 200


@pytest.mark.parametrize(("whose", "forbidden", "excepted"), FORBIDDEN)
def test_nobody_imports_what_the_table_forbids(whose, forbidden, excepted):
    broken = [
        f"{path} imports {name}"
        for path, module, name in all_imports()
        if is_within(module, whose)
        and is_within(name, forbidden)
        and not is_within(module, excepted)
    ]
    assert not broken, "; ".join(broken)


def test_core_imports_only_what_cannot_make_a_replay_differ():
    broken = [
        f"{path} imports {name}"
        for path, module, name in all_imports()
        if is_within(module, CORE) and not is_within(name, CORE_MAY)
    ]
    assert not broken, "; ".join(broken)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fedpruner_client.agent", (*TORCH, "numpy")),
        ("fedpruner_client.cli", TORCH),
        ("fedpruner_server.app", TORCH),
        ("fedpruner_server.core.planning", (*TORCH, "grpc", "google", "sqlite3", "sklearn")),
        ("fedpruner_server.core.round", (*TORCH, "grpc", "google", "sqlite3", "numpy")),
    ],
)
def test_importing_it_does_not_bring_in(module, unwanted):
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({unwanted!r})))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == []

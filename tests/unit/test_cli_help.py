import subprocess
import sys

import pytest

SERVER, AGENT = "fedpruner_server.cli", "fedpruner_client.cli"


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
@pytest.mark.parametrize("module", [SERVER, AGENT])
def test_help_answers_without_importing_anything_heavy(module, arguments):
    result = run("-X", "importtime", "-m", module, *arguments)
    assert result.returncode == 0
    assert "Usage:" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported  # the list is one
    heavy = {"torch", "transformers", "peft", "grpc", "numpy", "sklearn", "google"}
    assert not imported & heavy


@pytest.mark.parametrize("module", [SERVER, AGENT])
def test_the_version_is_told(module):
    from fedpruner_common import __version__

    result = run("-m", module, "version")
    assert (result.returncode, result.stdout) == (0, __version__ + "\n")


BAD = {
    "no such file": ([SERVER, "run", "--config", "none.toml"], "none.toml"),
    "not TOML": ([SERVER, "run", "--config", "broken.toml"], "cannot read the settings"),
    "an unknown key": ([SERVER, "run", "--config", "typo.toml"], "num_round"),
    "a wrong value": ([SERVER, "run", "--model", "m", "--num-rounds", "0"], "run.num_rounds"),
    "a missing value": ([SERVER, "run", "--num-rounds", "3"], "model"),
    "nothing to export": ([SERVER, "export", "--state-dir", "s", "--output", "o"], "no adapter"),
    "an agent without data": ([AGENT, "run", "--server", "127.0.0.1:1"], "data"),
    "an agent with a wrong size": (
        [AGENT, "run", "--data", "x", "--memory-budget", "lots"],
        "lots",
    ),
    "an agent with a wrong name": ([AGENT, "run", "--data", "x", "--name", "../x"], "name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_setting_is_one_line_that_names_it(tmp_path, case):
    arguments, named = BAD[case]
    (tmp_path / "broken.toml").write_text("[run\n")
    (tmp_path / "typo.toml").write_text('model = "m"\n[run]\nnum_round = 3\n')
    result = run("-m", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line

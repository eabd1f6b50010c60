"""Flower's own virtual environment, and the environment variables its programs get."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.wire.flower.errors import FlowerError, tail

DEFAULT_VENV = Path(tempfile.gettempdir()) / "fedpruner-flower-venv"
DEFAULT_VERSION = "1.41.0"
_REPOSITORY = Path(__file__).resolve().parents[3]
_INSTALL_TIMEOUT_S = 900
_NO_PROXY = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}  # any case
_PYTHON = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


def prepare(venv: Path, version: str) -> str:
    """The version of flwr that is installed in `venv`, after installing it where it is missing.

    Args:
        venv: a folder that is missing, empty or a virtual environment; never in the repository.
        version: as asked of pip; empty takes what pip resolves, or what is installed already.

    Raises:
        FlowerError: the folder is not fit, or making it or pip failed.
    """
    venv = venv.resolve()
    if venv.is_relative_to(_REPOSITORY):
        raise FlowerError(f"expected a virtual environment outside {_REPOSITORY}, got {venv}")
    if not (venv / "pyvenv.cfg").is_file():
        if venv.exists() and any(venv.iterdir()):
            raise FlowerError(f"{venv} is neither empty nor a virtual environment")
        _call([sys.executable, "-m", "venv", str(venv)])
    installed = _installed(venv)
    if installed is None or (version and installed != version):
        wanted = f"flwr=={version}" if version else "flwr"
        print(f"installing {wanted} into {venv}", file=sys.stderr, flush=True)
        _call([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", wanted])
        installed = _installed(venv)
    if installed is None:
        raise FlowerError(f"expected flwr in {venv} after pip installed it, found none")
    return installed


def variables(venv: Path, home: Path) -> dict[str, str]:
    """The environment of one of Flower's programs: no telemetry, no look-ups, a home of its own."""
    left_out = _NO_PROXY | {name.lower() for name in _PYTHON}
    kept = {k: v for k, v in os.environ.items() if k.lower() not in left_out}
    kept = {k: v for k, v in kept.items() if not k.startswith("FLWR_")}
    return {
        **kept,
        # SuperLink, SuperNode and SuperExec start each other by bare name.
        "PATH": os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _installed(venv: Path) -> str | None:
    code = "import importlib.metadata as m; print(m.version('flwr'))"
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _call(command: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in _PYTHON}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FlowerError(f"{command} was not done after {_INSTALL_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise FlowerError(f"{command} left with {done.returncode}:\n{tail(done.stdout)}")

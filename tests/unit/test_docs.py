"""The documentation says what the code does."""

import re
from pathlib import Path

from fedpruner_client.config import AgentSettings
from fedpruner_common.config import load
from fedpruner_server.config import ServerSettings

ROOT = Path(__file__).parent.parent.parent


def documented(number: int, tmp_path: Path) -> Path:
    """The TOML example of a program in the documentation, as a file."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    path = tmp_path / "documented.toml"
    # Keys that are commented out have no default; uncommented they must be accepted too.
    path.write_text(re.sub(r"^# (\w+ = )", r"\1", blocks[number], flags=re.MULTILINE))
    return path


def test_every_server_setting_is_documented_with_its_default(tmp_path):
    found = load(ServerSettings, documented(0, tmp_path), {}).model_dump()
    expected = ServerSettings(model=Path("path/to/model")).model_dump()
    expected |= {
        "ssl_certfile": Path("server.pem"),
        "ssl_keyfile": Path("server.key"),
        "health_server_address": "127.0.0.1:9094",
    }
    assert found == expected
    text = documented(0, tmp_path).read_text()
    for key, value in found.items():
        for name in value if isinstance(value, dict) else [key]:
            assert re.search(rf"^{name} = ", text, flags=re.MULTILINE), name


def test_every_agent_setting_is_documented_with_its_default(tmp_path):
    found = load(AgentSettings, documented(1, tmp_path), {}).model_dump()
    expected = AgentSettings(data=[Path("mine.jsonl")]).model_dump()
    expected |= {
        "name": "this-host",
        "memory_budget": 6 << 30,
        "root_certificates": Path("ca.pem"),
        "max_retries": 10,
        "offline_training_s": 600.0,
    }
    assert found == expected
    assert documented(1, tmp_path).read_text().count(" = ") == len(found)

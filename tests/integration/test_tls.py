"""The wire under TLS: a round, and who does not get in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from programs import Program, address_of, server_config

from fedpruner_client.ctl.admin import AdminClient
from fedpruner_common.errors import ConfigError, Unavailable

Start = Callable[..., Program]


def test_a_round_under_tls_and_nobody_without_the_right_certificate(
    start: Start, tmp_path: Path, small_model: Path, texts: dict[str, Path]
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "stranger", "cert", "key")}
    authority.cert_pem.write_to_path(str(paths["ca"]))
    stranger.cert_pem.write_to_path(str(paths["stranger"]))
    certificate.cert_chain_pems[0].write_to_path(str(paths["cert"]))
    certificate.private_key_pem.write_to_path(str(paths["key"]))
    config = server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        run={"num_rounds": 1, "min_available_clients": 1},
    )
    server = start(
        "server",
        "fedpruner_server.cli",
        "run",
        *("--config", str(config)),
        *("--state-dir", str(tmp_path / "server")),
        *("--ssl-certfile", str(paths["cert"])),
        *("--ssl-keyfile", str(paths["key"])),
    )
    address = address_of(server)
    for refused in ({"insecure": True}, {"root_certificates": paths["stranger"]}):
        admin = AdminClient(address, **refused)
        with pytest.raises(Unavailable, match="no coordinator answers"):
            admin.status()
        admin.close()
    admin = AdminClient(address, root_certificates=paths["ca"])
    assert admin.status().state in ("preparing", "waiting")
    admin.close()
    agent = start(
        "agent",
        "fedpruner_client.cli",
        "run",
        *("--server", address),
        *("--root-certificates", str(paths["ca"])),
        *("--name", "device"),
        *("--data", str(texts["counting-train"])),
        *("--state-dir", str(tmp_path / "agent")),
        *("--memory-budget", "4GiB"),
        *("--device", "cpu"),
    )
    assert [server.wait(), agent.wait()] == [0, 0]
    assert "update sent" in agent.output()


def test_an_address_off_this_machine_needs_certificates_or_the_word_insecure() -> None:
    with pytest.raises(ConfigError, match="--root-certificates"):
        AdminClient("192.0.2.1:9092")

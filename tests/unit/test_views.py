"""The tables an operator reads."""

import io

from rich.console import Console

from fedpruner_client.ctl import views
from fedpruner_common.pb import admin_pb2 as pb

MIB = 1 << 20


def text_of(view) -> str:
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def device(**fields) -> pb.Device:
    values = {"client_id": "phone", "state": "idle", "num_components_total": 4, "memory_ratio": 1.0}
    return pb.Device(**{**values, **fields})


def test_a_device_of_which_nothing_is_to_be_said_is_one_row():
    text = text_of(views.devices(pb.DevicesReply(devices=[device()])))
    assert len(text.strip().splitlines()) == 2


def test_what_a_device_has_shown_of_its_memory_is_told():
    reply = pb.DevicesReply(
        devices=[device(memory_ratio=1.25, too_much_bytes=64 * MIB, last_failure="killed")]
    )
    lines = [line.strip() for line in text_of(views.devices(reply)).splitlines()]
    assert lines[2:] == [
        "phone: killed",
        "phone: has run out of memory; gets nothing any more that takes 64 MiB above its floor",
        "phone: its predictions are corrected by 1.25, from its own peaks",
    ]


def test_a_round_tells_who_needed_less_and_what_that_was():
    client = pb.ClientRound(
        client_id="phone",
        outcome="stored",
        num_components=4,
        too_large=[8, 6],
        rungs=["micro-batch 8 -> 4", "gradient checkpointing"],
    )
    fine = pb.ClientRound(client_id="laptop", outcome="stored", num_components=8)
    reply = pb.RoundsReply(rounds=[pb.Round(round=1, phase="done", clients=[client, fine])])
    assert (
        text_of(views.rounds(reply))
        .splitlines()[1]
        .rstrip()
        .endswith(
            "phone: had no memory for 8, 6 components, got 4; "
            "phone: made do with less (micro-batch 8 -> 4, gradient checkpointing)"
        )
    )

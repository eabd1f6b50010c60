import gc
import json
import subprocess
import sys

import pytest

from fedpruner_common.errors import StorageError
from fedpruner_server.storage import JournalEntry, Storage, make_durable


@pytest.fixture
def storage(tmp_path):
    storage = Storage(tmp_path / "state")
    yield storage
    storage.close()


def test_a_second_coordinator_on_the_same_state_is_refused(storage):
    with pytest.raises(StorageError, match="another fedpruner-server is using"):
        Storage(storage.state_dir)
    gc.collect()  # what the refused one opened is closed, or this warns


def test_a_second_coordinator_in_another_process_is_refused(storage):
    code = (
        "import sys; from pathlib import Path; from fedpruner_server.storage import *\n"
        "try: Storage(Path(sys.argv[1]))\n"
        "except StorageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(storage.state_dir)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "another fedpruner-server is using" in result.stdout


def test_a_closed_state_can_be_opened_again(storage):
    storage.close()
    again = Storage(storage.state_dir)
    again.close()


def test_a_state_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to the state directory"):
        Storage(tmp_path / "file" / "state")


def test_a_journal_that_is_not_one_is_an_error(tmp_path):
    (tmp_path / "journal.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageError, match="cannot open the journal"):
        Storage(tmp_path)
    gc.collect()


def test_events_survive_reopening_in_their_order(storage):
    entries = [
        JournalEntry(1, "CohortChosen", {"tasks": {"a": "t1"}, "deadline": 12.5}),
        JournalEntry(2, "UpdateStored", {"client_id": "größer"}),
        JournalEntry(1, "Aggregated", {}),
    ]
    for entry in entries:
        storage.append(entry.round, entry.type, entry.data)
    assert storage.entries() == entries
    storage.close()
    again = Storage(storage.state_dir)
    again.append(3, "Late", {})
    assert again.entries() == [*entries, JournalEntry(3, "Late", {})]
    again.close()


def test_an_event_is_on_disk_when_append_returns(storage):
    code = (
        "import os, sys; from pathlib import Path; from fedpruner_server.storage import Storage\n"
        "Storage(Path(sys.argv[1])).append(7, 'Event', {'x': 1})\n"
        "os._exit(9)\n"  # no goodbye
    )
    storage.close()
    command = [sys.executable, "-c", code, str(storage.state_dir)]
    assert subprocess.run(command, timeout=60).returncode == 9
    again = Storage(storage.state_dir)
    assert again.entries() == [JournalEntry(7, "Event", {"x": 1})]
    again.close()


def test_facts_are_remembered_replaced_and_survive(storage):
    assert storage.fact("losses") is None
    storage.remember("losses", {"a": 1.5})
    storage.remember("losses", {"a": [None, True]})
    storage.close()
    again = Storage(storage.state_dir)
    assert again.fact("losses") == {"a": [None, True]}
    again.close()


def test_every_round_and_client_has_a_file_of_its_own(storage):
    assert storage.adapter_path(3).name == "round-0003.safetensors"
    paths = {storage.update_path(r, c) for r in (1, 2) for c in ("a", "b", "a.safetensors")}
    assert len(paths) == 6


def test_dropping_the_updates_of_a_round_leaves_those_of_others(storage):
    for number in (1, 2):
        path = storage.update_path(number, "a")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    storage.drop_updates(1)
    assert not storage.update_path(1, "a").exists()
    assert storage.update_path(2, "a").exists()
    storage.drop_updates(1)  # nothing there any more


def test_metrics_are_one_json_object_a_line(storage):
    size = storage.add_metrics([{"round": 1}], after_bytes=0)
    storage.add_metrics([{"round": 2, "text": "two\nlines"}], after_bytes=size)
    assert metrics_of(storage) == [{"round": 1}, {"round": 2, "text": "two\nlines"}]


def metrics_of(storage):
    lines = (storage.state_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_metrics_that_were_written_and_not_journaled_are_written_over(storage):
    size = storage.add_metrics([{"round": 1}], after_bytes=0)
    storage.add_metrics([{"round": 2}, {"lost": True}], after_bytes=size)
    storage.add_metrics([{"round": 2}], after_bytes=size)
    assert metrics_of(storage) == [{"round": 1}, {"round": 2}]
    with (storage.state_dir / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "half a li')
    storage.add_metrics([{"round": 2}, {"round": 3}], after_bytes=size)
    assert metrics_of(storage) == [{"round": 1}, {"round": 2}, {"round": 3}]
    storage.add_metrics([{"round": 4}], after_bytes=None)  # a journal without sizes: keep all
    assert [row["round"] for row in metrics_of(storage)] == [1, 2, 3, 4]


def test_what_has_arrived_of_other_updates_goes_when_a_client_begins_another(storage):
    first = storage.incoming_path("a", "11")
    first.write_bytes(b"x")
    other = storage.incoming_path("b", "22")
    other.write_bytes(b"y")
    assert storage.incoming_path("a", "11").read_bytes() == b"x"
    assert not storage.incoming_path("a", "33").exists()
    assert not first.exists()
    assert other.exists()


def test_a_run_has_an_id_of_its_own_that_stays(storage, tmp_path):
    assert storage.run_id == storage.run_id
    other = Storage(tmp_path / "other")
    assert other.run_id != storage.run_id
    other.close()


def test_a_disk_with_room_is_no_trouble_and_one_without_says_how_much_it_has(storage):
    assert storage.trouble(min_free_bytes=0) == ""
    assert "disk is full" in storage.trouble(min_free_bytes=1 << 60)
    assert not (storage.state_dir / "write-test").exists()


def test_a_file_made_durable_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "final").write_text("old")
    make_durable([(tmp_path / "new", tmp_path / "final")])
    assert (tmp_path / "final").read_text() == "new"
    assert not (tmp_path / "new").exists()


def test_the_bridges_of_a_round_that_is_over_go(storage):
    storage.drop_bridges()  # nothing there: nothing happens
    path = storage.bridge_path("0" * 64)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    storage.drop_bridges()
    assert not path.exists()

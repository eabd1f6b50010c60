import json

import pytest

from fedpruner_client.outbox import Outbox
from fedpruner_common.components import all_components
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, Task, TrainingSettings, UpdateMetrics

METRICS = UpdateMetrics(7, 99, 3.0, 2.0, 55, 1.5, rungs=("micro-batch 4 -> 2",))


def task(task_id="round-3-a"):
    return Task(
        task_id=task_id,
        round=3,
        submodel=Submodel.of(1, all_components(1)),
        tensors=(),
        files=(),
        lora=LoraSettings(4, 8, 0.0, ()),
        training=TrainingSettings(1, 1, 1, 8, 1e-3, 0.0, 1.0, False, "auto", 0),
        predicted_peak_bytes=1,
    )


@pytest.fixture
def update(tmp_path):
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"values")
    return path


def test_a_finished_update_is_found_by_the_next_agent(tmp_path, update):
    put = Outbox(tmp_path).put("run", task(), METRICS, update)
    found = Outbox(tmp_path).find("run", "round-3-a")
    assert found == put
    assert (found.round, found.metrics, found.path) == (3, METRICS, update)


def test_an_update_of_another_task_or_run_is_not_found(tmp_path, update):
    outbox = Outbox(tmp_path)
    assert outbox.find("run", "round-3-a") is None
    outbox.put("run", task(), METRICS, update)
    assert outbox.find("run", "round-4-a") is None
    assert outbox.find("other run", "round-3-a") is None


@pytest.mark.parametrize("damage", [b"value", b"", b"valueS", None])
def test_an_update_whose_file_is_damaged_or_gone_is_not_found(tmp_path, update, damage):
    outbox = Outbox(tmp_path)
    outbox.put("run", task(), METRICS, update)
    update.unlink() if damage is None else update.write_bytes(damage)
    assert outbox.find("run", "round-3-a") is None


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '{"run_id": "run"}'])
def test_a_note_that_makes_no_sense_is_as_none(tmp_path, update, note):
    outbox = Outbox(tmp_path)
    outbox.put("run", task(), METRICS, update)
    (tmp_path / "finished.json").write_text(note)
    assert outbox.find("run", "round-3-a") is None
    outbox.clear()


def test_what_was_sent_is_forgotten(tmp_path, update):
    outbox = Outbox(tmp_path)
    outbox.put("run", task(), METRICS, update)
    assert json.loads((tmp_path / "finished.json").read_text())["task_id"] == "round-3-a"
    outbox.clear()
    assert list(tmp_path.iterdir()) == []
    outbox.clear()

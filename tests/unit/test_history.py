from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.task import UpdateMetrics
from fedpruner_server.core.round import CohortChosen, Round, TaskFailed, UpdateStored, step
from fedpruner_server.history import ClientRecord, RoundRecord
from fedpruner_server.method import TaskPlan


def test_a_round_leaves_a_line_for_each_client_and_then_one_for_itself():
    current, _ = step(Round(2), CohortChosen({"b": "t2", "a": "t1"}, quorum=1, deadline=9.0))
    current, _ = step(current, UpdateStored("a"))
    current, _ = step(current, TaskFailed("b", "out of memory"))
    clients = {
        "b": ClientRecord("b", TaskPlan((ComponentId(0, Kind.FFN),), 50)),
        "a": ClientRecord(
            "a",
            TaskPlan((ComponentId(0, Kind.ATTENTION),), 60),
            metrics=UpdateMetrics(7, 99, 3.0, 2.0, 55, 1.5),
        ),
    }
    rows = RoundRecord(current, started=0.0, clients=clients, seconds=1.23456, loss=2.5).rows()
    assert [row.get("client_id") for row in rows] == ["a", "b", None]
    assert (rows[0]["outcome"], rows[0]["num_examples"], rows[0]["measured_peak_bytes"]) == (
        "stored",
        7,
        55,
    )
    assert (rows[1]["outcome"], rows[1]["reason"]) == ("failed", "out of memory")
    assert "num_examples" not in rows[1]
    assert (rows[2]["phase"], rows[2]["seconds"], rows[2]["eval_loss"]) == (
        "aggregating",
        1.235,
        2.5,
    )
    assert {row["round"] for row in rows} == {2}

from dataclasses import replace

import pytest
from toy_model import toy_statistics

from fedpruner_common.task import LoraSettings, ProbeTask
from fedpruner_server.survey import Survey

PROBE = ProbeTask(
    task_id="",
    num_layers=2,
    tensors=(),
    files=(),
    lora=LoraSettings(4, 8, 0.0, ()),
    granularity="layer",
    score="loo",
    num_sequences=8,
    max_seq_length=64,
    dtype="float32",
    seed=7,
)


@pytest.fixture
def survey():
    return Survey({"a": "probe-1-a", "b": "probe-1-b"}, PROBE)


def test_everyone_is_asked_the_same_under_an_id_of_their_own(survey):
    assert survey.task_of("a") == replace(PROBE, task_id="probe-1-a")
    assert survey.task_of("b") == replace(PROBE, task_id="probe-1-b")


def test_who_was_not_asked_has_nothing_to_do(survey):
    assert survey.task_of("c") is None
    assert survey.waiting_for(["c"]) == []


def test_who_answered_or_failed_has_nothing_left_to_do(survey):
    survey.results["a"] = toy_statistics((1.0, 2.0))
    assert survey.task_of("a") is None
    assert survey.task_of("b") is not None
    survey.failed["b"] = "no text"
    assert survey.task_of("b") is None


def test_the_survey_waits_for_those_that_live_and_have_not_answered(survey):
    assert survey.waiting_for(["a", "b", "c"]) == ["a", "b"]
    assert survey.waiting_for(["b"]) == ["b"]
    survey.results["b"] = toy_statistics((1.0, 2.0))
    assert survey.waiting_for(["a", "b"]) == ["a"]
    survey.failed["a"] = "no text"
    assert survey.waiting_for(["a", "b"]) == []


def test_two_surveys_share_no_answers(survey):
    survey.results["a"] = toy_statistics((1.0, 2.0))
    assert Survey({"a": "probe-2-a"}, PROBE).task_of("a") is not None

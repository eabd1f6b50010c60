import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedpruner_common.child import Child
from fedpruner_common.errors import BudgetTooSmall, ChildDied, FedPrunerError

HERE = str(Path(__file__).parent)


def ends(pid_fd, *, within_s=20.0):
    """Whether a process has ended, waiting for it; also for one that is not our child."""
    poll = select.poll()
    poll.register(pid_fd, select.POLLIN)
    try:
        return bool(poll.poll(within_s * 1000))
    finally:
        os.close(pid_fd)


@pytest.fixture
def child(tmp_path):
    child = Child("child_jobs", log_path=tmp_path / "logs" / "child.log", env={"PYTHONPATH": HERE})
    yield child
    child.close()


def test_a_job_gets_its_arguments_and_its_result_comes_back(child):
    result = child.call("echo", {"text": "größer\n", "numbers": [1, 2.5, None]})
    assert result["echo"] == {"text": "größer\n", "numbers": [1, 2.5, None]}


def test_no_process_runs_before_the_first_call_and_one_serves_all_calls(child):
    assert child.pid is None
    first = child.call("echo", {})["pid"]
    assert first == child.pid != os.getpid()
    assert child.call("echo", {})["pid"] == first


def test_progress_arrives_in_order_before_the_result(child):
    seen = []
    assert child.call("count", {"to": 3}, seen.append) == {"done": True}
    assert seen == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_progress_nobody_asked_for_is_dropped(child):
    assert child.call("count", {"to": 3}) == {"done": True}


def test_an_error_of_ours_is_raised_again_as_itself_and_the_child_goes_on(child):
    with pytest.raises(BudgetTooSmall, match=r"^12 bytes short$"):
        child.call("refuse", {})
    pid = child.pid
    assert child.call("echo", {})["pid"] == pid


def test_a_bug_in_a_job_is_named_and_its_traceback_is_in_the_log(child, tmp_path):
    with pytest.raises(FedPrunerError, match="ZeroDivisionError") as caught:
        child.call("bug", {})
    assert type(caught.value) is FedPrunerError
    assert "1 // 0" in (tmp_path / "logs" / "child.log").read_text()


def test_a_job_that_does_not_exist_is_an_error_not_a_hang(child):
    with pytest.raises(FedPrunerError, match="no_such_job"):
        child.call("no_such_job", {})


def test_a_killed_child_is_told_from_one_that_failed(child):
    with pytest.raises(ChildDied, match="lack of memory") as caught:
        child.call("killed", {})
    assert caught.value.returncode == -9
    assert child.pid is None


def test_a_child_that_leaves_without_an_answer_is_reported_with_its_last_words(child):
    with pytest.raises(ChildDied, match="the last words") as caught:
        child.call("leave", {})
    assert caught.value.returncode == 3


def test_a_dead_child_is_started_again_by_the_next_call(child):
    first = child.call("echo", {})["pid"]
    with pytest.raises(ChildDied):
        child.call("killed", {})
    assert child.call("echo", {})["pid"] != first


def test_what_a_job_prints_does_not_disturb_the_protocol(child, tmp_path):
    assert child.call("noisy", {}) == {"quiet": False}
    log = (tmp_path / "logs" / "child.log").read_text()
    assert "a library prints" in log
    assert "a C library writes" in log


def test_what_is_printed_at_import_does_not_disturb_the_protocol(tmp_path):
    env = {"PYTHONPATH": HERE, "NOISY_IMPORT": "1"}
    child = Child("child_jobs", log_path=tmp_path / "child.log", env=env)
    try:
        assert child.call("count", {"to": 1}) == {"done": True}
    finally:
        child.close()


def test_a_module_that_cannot_start_is_reported_with_its_reason(tmp_path):
    child = Child("no_such_module_at_all", log_path=tmp_path / "child.log")
    with pytest.raises(ChildDied, match="no_such_module_at_all"):
        child.call("echo", {})


def test_close_ends_the_process(child):
    pid_fd = os.pidfd_open(child.call("echo", {})["pid"])
    child.close()
    assert child.pid is None
    assert ends(pid_fd, within_s=0)
    child.close()  # nothing left to do


def test_kill_from_another_thread_ends_a_call_in_progress(child):
    running = threading.Event()
    killer = threading.Thread(target=lambda: running.wait() and child.kill())
    killer.start()
    with pytest.raises(ChildDied) as caught:
        child.call("hang", {}, lambda _: running.set())
    killer.join()
    assert caught.value.returncode == -9


def test_a_child_ends_in_the_middle_of_a_job_when_its_parent_dies(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fedpruner_common.child import Child\n"
        "child = Child('child_jobs', log_path=Path(sys.argv[1]))\n"
        "child.call('hang', {}, lambda values: print(values['pid'], flush=True))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "child.log")]
    env = {**os.environ, "PYTHONPATH": HERE}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        pid_fd = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    assert ends(pid_fd)

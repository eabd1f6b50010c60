"""`fedpruner demo`, made smaller: the facts it leaves, and that it leaves no process behind."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from peft import PeftModel
from programs import Program
from transformers import AutoModelForCausalLM

Start = Callable[..., Program]
SMALL = ("--max-steps", "1", "--batch-size", "8", "--max-seq-length", "128")


def test_the_demo_leaves_its_facts_and_an_adapter_that_loads(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    demo = start(
        "demo",
        "fedpruner_client.ctl.cli",
        "demo",
        *("--output-dir", str(run_dir)),
        *("--num-rounds", "2"),
        *SMALL,
    )
    assert demo.wait(180) == 0, demo.output()
    last_line = demo.stdout_path.read_text().splitlines()[-1]
    assert last_line == str(run_dir / "summary.json")
    summary = json.loads(Path(last_line).read_text())
    assert summary["rounds"] == 2
    assert summary["loss_final"] < summary["loss_base"]
    assert len(summary["devices"]) == 4
    kept = [len(device["components"]) for device in summary["devices"]]
    # 12 layers: all, two thirds, five twelfths, a quarter; two components each.
    assert kept == [24, 16, 10, 6]
    for device in summary["devices"]:
        assert device["num_components_total"] == 24
        assert device["predicted_peak_bytes"] <= device["budget_bytes"]
        assert device["measured_peak_bytes"] == pytest.approx(
            device["predicted_peak_bytes"], rel=0.06
        )
        assert device["base_bytes_down"][0] > 0
        assert device["base_bytes_down"][1] == 0
        assert device["bytes_down"][1] < 1 << 20
        assert len(device["bytes_up"]) == 2
    budgets = [device["budget_bytes"] for device in summary["devices"]]
    assert budgets == sorted(budgets, reverse=True)
    # The two printed lines.
    model = AutoModelForCausalLM.from_pretrained(summary["model_dir"])
    model = PeftModel.from_pretrained(model, summary["adapter_dir"])
    assert f'from_pretrained(model, "{summary["adapter_dir"]}")' in demo.output()


def test_ctrl_c_stops_every_process_of_the_demo(start: Start, tmp_path: Path) -> None:
    demo = start(
        "demo",
        "fedpruner_client.ctl.cli",
        "demo",
        *("--output-dir", str(tmp_path / "run")),
        *("--num-rounds", "50"),
        *SMALL,
    )
    demo.wait_for("phone:", 90)
    family = psutil.Process(demo.pid).children(recursive=True)
    assert len(family) >= 5
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(30) == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert "stopped" in demo.output()
    assert "Traceback" not in demo.output()


def test_the_demo_refuses_a_folder_that_is_in_use(start: Start, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    demo = start("demo", "fedpruner_client.ctl.cli", "demo", "--output-dir", str(tmp_path))
    assert demo.wait() == 1
    assert "is not empty" in demo.output()
    assert (tmp_path / "thesis.tex").read_text() == "mine"

"""One measurement: some rounds of the app in a deployment of its own."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.wire.flower.deployment import Deployment
from benchmarks.wire.flower.environment import DEFAULT_VENV, DEFAULT_VERSION, prepare
from benchmarks.wire.flower.processes import PERIOD_S, Sample, Sampler, runs

_MEGABYTE = 10**6
_TINY_BYTES = 8
_READY_TIMEOUT_S = 120
# Beside a round's own timeout: arrays are made before it and compared after it.
_BETWEEN_ROUNDS_S = 120


def run(
    megabytes: int,
    *,
    clients: int = 1,
    rounds: int = 4,
    venv: Path = DEFAULT_VENV,
    version: str = DEFAULT_VERSION,
    round_timeout_s: float = 600,
) -> dict[str, Any]:
    """Times, CPU and memory of rounds that send so much down to each client and up again.

    Args:
        megabytes: of 10^6 bytes, per client and direction; 0 sends 8 bytes, an empty round.
        rounds: measured ones; one more comes before them and is reported as `first_...`.
        venv: made, and flwr installed in it, where missing; outside the repository.
        version: of flwr; empty for what pip resolves.

    Returns:
        What is printed as JSON. `seconds` and `cpu_seconds` have one number per round,
        `run_cpu_seconds` is of the whole run. Peaks are over all rounds' time, first one
        included, of sums over all processes: `peak_rss_bytes`, sampled each 100 ms, counts a
        shared page once per process; `peak_pss_bytes`, each second or less often because it is
        dear, counts it once. `idle_...`: all programs up and connected, no arrays yet.

    Raises:
        FlowerError: installing, starting or a round failed; with the end of a log.
    """
    venv = venv.resolve()
    installed = prepare(venv, version)
    payload = megabytes * _MEGABYTE or _TINY_BYTES
    _say(f"flwr {installed}: {payload} bytes, {clients} clients, 1 + {rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="fedpruner-flower-") as name:
        events = Path(name) / "events.jsonl"
        deployment = Deployment(venv, Path(name))
        settings: dict[str, int | float | str] = {
            "bytes": payload,
            "clients": clients,
            "rounds": 1 + rounds,
            "timeout": round_timeout_s,
            "events": str(events),
        }
        with Sampler(deployment.tree) as sampler:
            try:
                deployment.start(clients)
                deployment.submit(settings)
                told = _follow(deployment, events, round_timeout_s)
                sampler.wait_beyond(told[-1]["at"])
            finally:
                deployment.tree.stop()
    _say(f"{len(sampler.samples)} samples took {sampler.own_cpu_s:.1f} CPU s beside it")
    return {
        "system": "flower",
        "version": installed,
        "mode": "round_trip" if megabytes else "tiny",
        "megabytes": megabytes,
        "payload_bytes": payload,
        "clients": clients,
        **_summary(told, sampler),
    }


def _follow(deployment: Deployment, events: Path, round_timeout_s: float) -> list[dict[str, Any]]:
    """What the ServerApp tells until it is done."""
    told: list[dict[str, Any]] = []
    limit_s: float = _READY_TIMEOUT_S
    deadline = time.monotonic() + limit_s
    while not (told and told[-1]["event"] == "done"):
        new = _read(events)[len(told) :]
        if new:
            limit_s = round_timeout_s + _BETWEEN_ROUNDS_S
            deadline = time.monotonic() + limit_s
        for event in new:
            _tell(deployment, event)
        told += new
        if new:
            continue
        deployment.check()
        if told and not runs(told[0]["pid"]) and len(_read(events)) == len(told):
            raise deployment.failure("the ServerApp ended before its last round")
        if time.monotonic() > deadline:
            raise deployment.failure(f"nothing from the ServerApp for {limit_s:.0f} s")
        time.sleep(PERIOD_S)
    return told


def _tell(deployment: Deployment, event: dict[str, Any]) -> None:
    """Progress for the reader, or the ServerApp's own error."""
    if event["event"] == "failed":
        raise deployment.failure(f"the ServerApp failed: {event['error']}")
    if event["event"] == "round":
        seconds = event["end"] - event["begin"]
        _say(f"round {event['round']}: {seconds:.2f} s, equal: {event['equal']}")


def _summary(told: list[dict[str, Any]], sampler: Sampler) -> dict[str, Any]:
    ready = next(event for event in told if event["event"] == "ready")
    rounds = [event for event in told if event["event"] == "round"]
    seconds = [round(event["end"] - event["begin"], 3) for event in rounds]
    cpu = [round(sampler.cpu_s_between(event["begin"], event["end"]), 2) for event in rounds]
    during = [s for event in rounds for s in sampler.within(event["begin"], event["end"])]
    idle = sampler.within(ready["begin"], ready["end"])
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "cpu_seconds": cpu[1:],
        "first_cpu_seconds": cpu[0],
        "run_cpu_seconds": round(max(sample.cpu_s for sample in sampler.samples), 2),
        "peak_rss_bytes": max(sample.rss_bytes for sample in during),
        "peak_pss_bytes": _peak_pss_bytes(during),
        "idle_rss_bytes": max((sample.rss_bytes for sample in idle), default=None),
        "idle_pss_bytes": _peak_pss_bytes(idle),
        "equal": all(event["equal"] for event in rounds),
    }


def _peak_pss_bytes(samples: list[Sample]) -> int | None:
    """None where no sample has it: the stretch was too short."""
    return max((s.pss_bytes for s in samples if s.pss_bytes is not None), default=None)


def _read(events: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one may be half written."""
    if not events.is_file():
        return []
    text = events.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""`docs/wire.md` from the records; every number on the page follows from them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.wire.charts import Bar, bars
from benchmarks.wire.records import RECORDS, ROOT, Record, read

PAGE = ROOT / "docs" / "wire.md"
PICTURES = ROOT / "docs" / "results"
_MB, _MIB = 1e6, 1 << 20

Row = Sequence[str]


def write(records: Path = RECORDS) -> None:
    """Write the page and its pictures."""
    newest = _newest(read(records))
    PICTURES.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(newest), encoding="utf-8")
    for name, picture in _pictures(newest).items():
        (PICTURES / name).write_text(picture, encoding="utf-8")


def _newest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each kind's last run."""
    found: dict[str, list[Record]] = {}
    for record in records:
        same = found.setdefault(record["kind"], [])
        if same and same[0]["run"] != record["run"]:
            same.clear()
        same.append(record)
    return found


def page(found: dict[str, list[Record]]) -> str:
    """The page, of records by kind."""
    lines = [
        "# The wire",
        "",
        "Made by `python -m benchmarks.wire report` from `benchmarks/results/wire.jsonl`. All of "
        "it is loopback on one machine, so absolute speeds are the machine's; ratios are of "
        "neighbours in one run, and CPU seconds are what to carry over to another machine. "
        "Median [lowest to highest]. 1 GB = 10⁹ bytes, 1 MB = 10⁶.",
        "",
        "Ours is the product: a whole `fedpruner-server` on one side, its agent's `Connection`, "
        "`Transfers` and `Cache` on the other, each a process of its own. Bytes go from a "
        "checkpoint's file to files whose BLAKE3 has been compared. The bare sockets do less: one "
        "stream, one file, nothing checked.",
        "",
        *_goals(found),
        *_transfers(found.get("down", ()), "1. 1 GB down", "wire-down.svg"),
        *_transfers(found.get("up", ()), "2. An update of 100 MB up", ""),
        *_memory(found.get("memory", ())),
        *_uploads(found.get("uploads", ())),
        *_rounds(found.get("rounds", ())),
        *_flower(found.get("flower", ())),
        *_run(found),
    ]
    return "\n".join(lines) + "\n"


# The goals.


def _goals(found: dict[str, list[Record]]) -> list[str]:
    rows = [row for row in _goal_rows(found) if row]
    header = ["", "goal", "measured", ""]
    return ["## Goals", "", *_table(header, rows, words=4)]


def _goal_rows(found: dict[str, list[Record]]) -> Iterable[Row]:
    for kind, what in (("down", "1 GB down"), ("up", "100 MB up")):
        records = found.get(kind, [])
        for way, goal, against in (
            ("ours, clear", 0.9, "sendfile to file"),
            ("ours, tls", 1.3, "a Python TLS socket to file"),
        ):
            if ratios := _ratios(records, way):
                reached = median(ratios)
                name = f"{what}, {'TLS' if 'tls' in way else 'in the clear'}"
                yield [
                    name,
                    f"≥ {goal:.0%} of {against}",
                    _spread(ratios, "%"),
                    _met(reached >= goal),
                ]
    if memory := found.get("memory"):
        growth = max(_per_stream(r) for r in memory)
        yield [
            "coordinator's memory per download",
            "≤ 10 MB",
            f"{growth / _MB:.1f} MB at most",
            _met(growth <= 10 * _MB),
        ]
        peaks = {
            (r["model"], r["agents"]): r["server"]["peak_rss_bytes"]
            for r in memory
            if r["max_downloads"] == "default"
        }
        crowds = sorted({agents for _, agents in peaks})
        ratios = [peaks["large", agents] / peaks["small", agents] for agents in crowds]
        yield [
            "coordinator's memory, four times the model, as many agents",
            "the same (within 10 %)",
            f"{min(ratios) - 1:+.0%} to {max(ratios) - 1:+.0%}",
            _met(max(ratios) <= 1.1),
        ]
        first, last = (peaks["large", agents] / _MB for agents in (crowds[0], crowds[-1]))
        yield [
            f"coordinator's memory, {crowds[-1]} agents instead of {crowds[0]}, the larger model",
            "the same (within 10 %)",
            f"{first:.0f} to {last:.0f} MB; 16 streams at once at most",
            _met(last <= 1.1 * first),
        ]
    if down := [r for r in found.get("down", ()) if r["path"].startswith("ours")]:
        most = max(r["client_above_floor_bytes"] for r in down)
        yield [
            "agent's anonymous memory while it receives",
            "≤ 64 MiB above its floor",
            f"{most / _MIB:.0f} MiB",
            _met(most <= 64 * _MIB),
        ]
    if uploads := found.get("uploads"):
        peak = median(r["server"]["peak_rss_bytes"] for r in uploads)
        yield [
            "coordinator's peak with 100 uploads of 1 MB at once",
            "≤ 150 MB",
            f"{peak / _MB:.0f} MB",
            _met(peak <= 150 * _MB),
        ]
    for r in found.get("rounds", ()):
        if (r["agents"], r["payload"]) == (10, "1 KiB"):
            yield [
                "empty round of 10 agents",
                "≤ 10 ms",
                f"{_spread(r['ms_per_round'], '.1f')} ms",
                _met(r["median_ms"] <= 10),
            ]
    theirs, ours = _flower_pair(found.get("flower", ()))
    if theirs and ours:
        faster = median(theirs["seconds"]) / median(r["seconds"] for r in ours)
        peak = max(r["peak_rss_bytes"] for r in ours)
        less = (theirs["peak_pss_bytes"] or theirs["peak_rss_bytes"]) / peak
        yield [
            "1 GB there and back",
            "≥ 10 times faster than Flower",
            f"{faster:.1f} times",
            _met(faster >= 10),
        ]
        yield ["memory for it", "≤ 1/30 of Flower's", f"1/{less:.0f}", _met(less >= 30)]


def _met(reached: bool) -> str:
    return "met" if reached else "**missed**"


def _per_stream(r: Record) -> float:
    most = r["agents"] if r["max_downloads"] != "default" else min(r["agents"], 16)
    growth: float = r["server"]["rss_growth_bytes"]
    return growth / most


# Transfers.


def _ratios(records: Iterable[Record], way: str) -> list[float]:
    """How much faster than its bare socket, of each pair; a ratio of 1 is as fast."""
    by = {(r["path"], r["repetition"]): r for r in records}
    found = []
    for (name, repetition), r in by.items():
        other = by.get((r["against"], repetition))
        if name == way and other:
            found.append(other["seconds"] / r["seconds"] * r["bytes"] / other["bytes"])
    return found


def _transfers(records: Sequence[Record], title: str, picture: str) -> list[str]:
    lines = [f"## {title}", ""]
    if not records:
        return [*lines, "Not measured yet.", ""]
    if picture:
        lines += [f"![GB/s of ours and of bare sockets](results/{picture})", ""]
    rows = []
    for way in dict.fromkeys(r["path"] for r in records):
        mine = [r for r in records if r["path"] == way]
        others = median(r["others_cores"] for r in mine)
        rows.append(
            [
                way,
                _spread([r["gb_per_s"] for r in mine], ".2f"),
                _spread(_ratios(records, way), "%"),
                _both(mine, "cpu_s", 1.0, ".2f"),
                _both(mine, "peak_rss_bytes", _MB, ".0f"),
                f"{max(r['client_above_floor_bytes'] for r in mine) / _MB:.0f}",
                f"{others:.2f}",
            ]
        )
    header = [
        "way", "GB/s", "of its bare socket", "CPU s, server + client", "peak RSS, MB",
        "client's memory above its floor, MB",
        "cores taken by others",
    ]  # fmt: skip
    lines += _table(header, rows)
    first = records[0]
    lines += [
        f"{1 + max(r['repetition'] for r in records)} repetitions after one to warm up, in turn. "
        f"{first['bytes'] / _MB:,.0f} MB, from and to {first['file_system']}, source in the page "
        "cache. Peak RSS of a sender that maps its file includes the file's pages. *Above its "
        "floor*: anonymous memory, at most, against the same process before its first transfer. "
        "*Cores taken by others* includes the kernel's own threads, which write to the disk what "
        "arrived.",
        "",
    ]
    if hashing := [r["hash_seconds"] for r in records if "hash_seconds" in r]:
        lines += [
            "Ours includes asking for a slot, comparing the hash, checking every value, `fsync` "
            "and the journal; not the agent's own hash of its update before it asks "
            f"({_spread([1e3 * s for s in hashing], '.0f')} ms), which it also needs after a "
            "restart. *Synced* is `fsync` before the answer.",
            "",
        ]
    return lines


def _both(records: Sequence[Record], key: str, unit: float, form: str) -> str:
    parts = [median(r[side][key] for r in records) / unit for side in ("server", "client")]
    return " + ".join(format(part, form) for part in parts)


# Memory.


def _memory(records: Sequence[Record]) -> list[str]:
    lines = ["## 3. The coordinator while many download", ""]
    if not records:
        return [*lines, "Not measured yet.", ""]
    rows = [
        [
            f"{r['model_bytes'] / _MB:.0f} MB",
            str(r["max_downloads"]),
            str(r["agents"]),
            f"{r['bytes'] / 1e9:.1f} GB",
            f"{r['bytes'] / r['seconds'] / 1e9:.2f}",
            f"{r['server']['peak_rss_bytes'] / _MB:.0f}",
            f"{r['server']['rss_growth_bytes'] / _MB:.1f}",
            f"{_per_stream(r) / _MB:.1f}",
            f"{r['server']['cpu_s'] / r['bytes'] * 1e9:.2f}",
        ]
        for r in records
    ]
    header = [
        "model", "streams at once", "agents", "moved", "GB/s", "peak RSS, MB", "growth, MB",
        "growth per stream, MB", "server's CPU s per GB",
    ]  # fmt: skip
    return [
        *lines,
        "A new coordinator each time; its agents are coroutines of one process with a connection "
        "each, and throw away what they get. *Default* is `transfer.max_downloads` = 16: the "
        "others wait for their turn. Growth is of the resident set from before the first byte.",
        "",
        *_table(header, rows),
    ]


def _uploads(records: Sequence[Record]) -> list[str]:
    lines = ["## 4. A hundred uploads of 1 MiB at once", ""]
    if not records:
        return [*lines, "Not measured yet.", ""]
    peaks = [r["server"]["peak_rss_bytes"] / _MB for r in records]
    anonymous = [r["server"]["peak_anon_bytes"] / _MB for r in records]
    later = [r["aggregating"]["peak_rss_bytes"] / _MB for r in records]
    seconds = [r["seconds"] for r in records]
    return [
        *lines,
        f"{records[0]['agents']} agents with an update of {records[0]['update_bytes']:,} bytes ask "
        f"at the same moment; slots let in 8 at a time. All are stored after "
        f"{_spread(seconds, '.2f')} s. The coordinator's peak meanwhile: {_spread(peaks, '.0f')} "
        f"MB resident, of them {_spread(anonymous, '.0f')} MB anonymous. While it combines these "
        f"updates afterwards: {_spread(later, '.0f')} MB resident.",
        "",
    ]


# Rounds.


def _rounds(records: Sequence[Record]) -> list[str]:
    lines = ["## 5. Rounds in which nobody trains", ""]
    if not records:
        return [*lines, "Not measured yet.", ""]
    rows = [
        [
            r["payload"],
            str(r["agents"]),
            str(r["rounds"]),
            _spread(r["ms_per_round"], ".1f"),
            f"{r['moving_ms']:.1f}",
            f"{r['between_ms']:.1f}",
            f"{r['server_cpu_ms_per_round']:.1f} + {r['client_cpu_ms_per_round']:.1f}",
            f"{r['server_cpu_ms_per_round'] / r['agents']:.2f}",
            f"{r['server']['peak_rss_bytes'] / _MB:.0f}",
        ]
        for r in records
    ]
    header = [
        "adapter", "agents", "rounds", "ms per round", "of it moving", "of it between",
        "CPU ms, server + agents", "server's per agent", "server's peak RSS, MB",
    ]  # fmt: skip
    return [
        *lines,
        "![milliseconds per round](results/wire-rounds.svg)",
        "",
        "The product's round whole: planning, journal, checks, aggregation, export, metrics; no "
        "held-out text. Agents are coroutines of one process that pull, fetch the adapter and send "
        "it back. *Moving* is from the first agent's task to the last one's answer, *between* from "
        "there to the next round's first task.",
        "",
        *_table(header, rows),
    ]


# Flower.


def _flower_pair(records: Sequence[Record]) -> tuple[Record | None, list[Record]]:
    ours = [r for r in records if r["system"] == "ours"]
    theirs = [r for r in records if r["system"] == "flower"]
    return (theirs[-1] if theirs else None), ours


def _flower(records: Sequence[Record]) -> list[str]:
    lines = ["## 6. Beside Flower: 1 GB there and back", ""]
    theirs, ours = _flower_pair(records)
    if theirs is None or not ours:
        return [*lines, "Not measured yet: `python -m benchmarks.wire flower`.", ""]
    pss = theirs["peak_pss_bytes"] or theirs["peak_rss_bytes"]
    rows = [
        [
            f"Flower {theirs['version']}",
            _spread(theirs["seconds"], ".2f"),
            _spread(theirs["cpu_seconds"], ".1f"),
            f"{theirs['peak_rss_bytes'] / _MB:,.0f}",
            f"{pss / _MB:,.0f}",
        ],
        [
            "ours",
            _spread([r["seconds"] for r in ours], ".2f"),
            _spread([r["cpu_seconds"] for r in ours], ".1f"),
            f"{max(r['peak_rss_bytes'] for r in ours) / _MB:,.0f}",
            "",
        ],
    ]
    header = ["", "s", "CPU s", "peak RSS of all processes, MB", "peak PSS, MB"]
    return [
        *lines,
        *_table(header, rows),
        "Not like for like. Flower moves arrays that are in memory through a store and starts a "
        "process per round; its ServerApp and ClientApp hold the gigabyte. Ours moves files, down "
        f"in one stream, up as {ours[0]['bytes_up'] / ours[0]['bytes_down'] * 10:.0f} updates of "
        "100 MB, since an update is never larger than its task's adapter; each is hashed, checked "
        "and durable. `benchmarks/wire/flower` says what its times include. The ratio of memory "
        "compares Flower's PSS, which counts a shared page once, with our sum of RSS.",
        "",
    ]


# What was run.


def _run(found: dict[str, list[Record]]) -> list[str]:
    lines = ["## 7. What was run", ""]
    for kind, records in found.items():
        r = records[0]
        loads = [x["load_average"] for x in records]
        lines.append(
            f"- {kind}: `{r['command'].strip()}`, {r['run']}, commit "
            f"`{r['commit']}`, {r['machine']}, "
            f"{r['cpu']}, Python {r['python']}, grpcio {r['grpcio']}, protobuf {r['protobuf']}, "
            f"blake3 {r['blake3']}, xxhash {r['xxhash']}; {r['file_system']}; load average "
            f"{min(loads):.1f} to {max(loads):.1f}; this session's priority among sessions "
            f"{r['autogroup'] or 'unknown'}."
        )
    return lines


def _pictures(found: dict[str, list[Record]]) -> dict[str, str]:
    pictures = {}
    groups = []
    for kind in ("down", "up"):
        records = found.get(kind, [])
        group: list[Bar] = []
        for way in dict.fromkeys(r["path"] for r in records):
            speeds = [r["gb_per_s"] for r in records if r["path"] == way]
            text = f"{median(speeds):.2f}"
            if ratios := _ratios(records, way):
                text += f" ({median(ratios):.0%})"
            color = 0 if way.startswith("ours") else 2 if "no file" in way else 1
            group.append(
                Bar(f"{way}, {kind}", median(speeds), min(speeds), max(speeds), text, color)
            )
        if group:
            groups.append(group)
            pictures["wire-down.svg"] = bars(
                "1 GB down, 100 MB up", "GB/s, and % of the bare socket to file", groups
            )
    if rounds := found.get("rounds"):
        groups = [
            [
                Bar(
                    f"{r['agents']} agents, {payload}",
                    r["median_ms"] / r["agents"],
                    min(r["ms_per_round"]) / r["agents"],
                    max(r["ms_per_round"]) / r["agents"],
                    f"{r['median_ms'] / r['agents']:.1f} ({r['median_ms']:,.0f} per round)",
                    index,
                )
                for r in rounds
                if r["payload"] == payload
            ]
            for index, payload in enumerate(dict.fromkeys(r["payload"] for r in rounds))
        ]
        pictures["wire-rounds.svg"] = bars("Rounds without training", "ms per agent", groups)
    return pictures


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    if form == "%":
        return f"{median(values):.0%} [{min(values):.0%} to {max(values):.0%}]"
    low, high = min(values), max(values)
    return f"{median(values):{form}} [{low:{form}} to {high:{form}}]"


def _table(header: Row, rows: Iterable[Row], *, words: int = 1) -> list[str]:
    """Lines of a Markdown table, numbers to the right; a blank line ends it."""
    ends = ["---"] * words + ["--:"] * (len(header) - words)
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(ends) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]

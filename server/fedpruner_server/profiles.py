"""Named sets of options: the paper's method, and every method it is compared with.

A profile gives values to settings that are not given otherwise, nothing more: one code path serves
all, and each difference is one option that can be changed alone.
"""

from typing import Any

from pydantic import BaseModel

Values = dict[str, Any]

# Nothing that this project added to the paper's method or to a baseline's.
_PLAIN: Values = {
    "coverage": "off",
    "protect": [],
    "bridge": "off",
    "correction": False,
    "streaming": False,
    "joint": False,
}
_PAPER: Values = {
    **_PLAIN,
    "policy": "fedpruner",
    "grouping": "spectral",
    "selection": "sample",
    "temperature": 1.0,
    "floor": 0.0,
    "importance": "loo",
    "statistics": "device",
    "statistics_every": 1,
    "rms_rows": False,
}


def _policy(name: str, **options: Any) -> dict[str, Values]:
    return {"plan": {**_PLAIN, "policy": name, **options}}


PROFILES: dict[str, dict[str, Values]] = {
    "default": {},
    "paper": {"plan": _PAPER, "aggregation": {"method": "fedit"}},
    "paper-plus": {"plan": {**_PAPER, "granularity": "component"}},
    "fedra": _policy("random"),
    "depth": _policy("depth"),
    "last": _policy("last"),
    "bi": _policy("top", importance="bi"),
    "even": _policy("even"),
    "random-groups": _policy("fedpruner", grouping="random", selection="argmax"),
    "exclusive": _policy("exclusive"),
    "full": _policy("full"),
    "hetlora": {**_policy("full"), "aggregation": {"method": "hetlora"}},
    "flexlora": {**_policy("full"), "aggregation": {"method": "flexlora"}},
}


def apply_profile(values: Values) -> Values:
    """The given settings, with those of their profile where they say nothing.

    What is not a profile, or not a table, stays as it is: checking it is for the settings.
    """
    name = values.get("profile", "default")
    options = PROFILES.get(name, {}) if isinstance(name, str) else {}
    filled = dict(values)
    for table, defaults in options.items():
        given = filled.get(table, {})
        if isinstance(given, BaseModel):
            given = given.model_dump(exclude_unset=True)
        if isinstance(given, dict):
            filled[table] = {**defaults, **given}
    return filled

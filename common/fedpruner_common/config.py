"""Settings from flags, environment and a TOML file, in this order of precedence."""

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from fedpruner_common.errors import ConfigError

Values = dict[str, Any]
SettingsT = TypeVar("SettingsT", bound="Settings")


class Section(BaseModel):
    """A table of the TOML file; an unknown key is an error, most often a typo."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(BaseSettings):
    """Base of a program's settings; see `load`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is given
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = [init_settings, env_settings]
        if path := settings_cls.model_config.get("toml_file"):
            sources.append(TomlConfigSettingsSource(settings_cls, path))
        return tuple(sources)


def load(settings_class: type[SettingsT], config_file: Path | None, flags: Values) -> SettingsT:
    """Read settings.

    Args:
        settings_class: of the program.
        config_file: TOML; None for none.
        flags: from the command line, `section.key` -> value; None values were not given.

    Raises:
        ConfigError: the file cannot be read, or a setting is missing, unknown or wrong.
    """
    if config_file is not None and not config_file.is_file():
        raise ConfigError(f"there is no config file {config_file}")
    values: Values = {}
    for key, value in flags.items():
        if value is None:
            continue
        table = values
        *sections, name = key.split(".")
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    loaded = type(
        settings_class.__name__,
        (settings_class,),
        {"model_config": {**settings_class.model_config, "toml_file": config_file}},
    )
    try:
        settings: SettingsT = loaded(**values)
        return settings
    except ValidationError as error:
        raise ConfigError(_explain(settings_class, error)) from error
    except (OSError, ValueError) as error:  # malformed TOML, or a variable that is not JSON
        raise ConfigError(f"cannot read the settings: {error}") from error


def _explain(settings_class: type[Settings], error: ValidationError) -> str:
    prefix = settings_class.model_config.get("env_prefix", "")
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        variable = prefix + "__".join(str(part) for part in item["loc"]).upper()
        where = f" (environment variable {variable})" if variable in os.environ else ""
        got = "" if item["type"] == "missing" else f", got {item['input']!r}"
        lines.append(f"setting {key}{where}: {item['msg'][:1].lower()}{item['msg'][1:]}{got}")
    return "; ".join(lines)

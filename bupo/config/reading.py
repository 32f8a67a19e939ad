"""Settings from YAML and `key=value`, strict about names, and back again.

The text under a field is its help; `--help` prints it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from bupo.config.errors import ConfigError, require

Settings = TypeVar("Settings")
"""A dataclass of settings: values, and dataclasses as groups of them"""


def shipped(name: str) -> Path:
    """The file of that name, or the one that comes with bupo among its recipes."""
    package = Path(__file__).parent.parent
    beside = (package / "recipes" / name, package.parent / "recipes" / name)
    return next((path for path in (Path(name), *beside) if path.is_file()), Path(name))


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def _elements(schema: type, f: Field[Any]) -> type | None:
    """The dataclass that a list of settings is made of."""
    found = next(iter(get_args(get_type_hints(schema)[f.name])), None)
    return found if isinstance(found, type) and is_dataclass(found) else None


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key, leaves only; those of a list's elements as `phases[].layer`."""
    names: list[str] = []
    for f in fields(schema):
        default, elements = _default(f), _elements(schema, f)
        if is_dataclass(default):
            names += all_keys(type(default), f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
        if elements:
            names += all_keys(elements, f"{prefix}{f.name}[].")
    return names


def read(file: Path | None, overrides: list[str], schema: type[Settings]) -> Settings:
    """The settings of a YAML file and `key=value` overrides.

    Raises ConfigError, one line: an unknown key (naming the nearest), a value of the wrong type, a
    missing file, an impossible combination.
    """
    merged = OmegaConf.structured(schema)
    reading = str(file)
    try:
        if file is not None:
            if not file.is_file():
                raise ConfigError(f"configuration file not found: {file}")
            merged = OmegaConf.merge(merged, OmegaConf.load(file))
        for text in overrides:
            reading = text
            require(text.find("=") > 0, f"expected key=value, got {text!r}")
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([text]))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        lists = {_elements(schema, f): f"{f.name}[]." for f in fields(schema)}  # type: ignore[arg-type]
        name = lists.get(error.object_type, "") + str(error.full_key)
        near = difflib.get_close_matches(name, all_keys(schema), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown key {name}{hint}") from None
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{getattr(error, 'full_key', None) or reading}: {first_line}") from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{reading} cannot be read: {text}") from None
    except (ValueError, TypeError) as error:  # from OmegaConf: a value of the wrong structure
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{reading}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, schema)
    for key, value in values(config).items():
        if isinstance(value, float) and not math.isfinite(value) and "clip" not in key:
            raise ConfigError(f"{key} must be finite, got {value}")
    return config


def values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key and its value."""
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            found |= values(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value
    return found


def changes_since(file: Path, config: Any, may_change: tuple[str, ...]) -> list[str]:
    """`key: old -> new` of the settings, others than those that may change, that differ from a file
    of such settings."""
    old = values(read(file, [], type(config)))
    return [
        f"{key}: {old[key]} -> {value}"
        for key, value in values(config).items()
        if value != old[key] and not key.startswith(may_change)
    ]


def dump(config: Any) -> str:
    """The settings as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, help) of every key, the help taken from the text under each field."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for item, following in zip(body.body, body.body[1:]):
        if isinstance(item, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(item.target, ast.Name)
            texts[item.target.id] = " ".join(ast.literal_eval(following.value).split())
    rows: list[tuple[str, str, str]] = []
    for f in fields(schema):
        default, elements = _default(f), _elements(schema, f)
        if is_dataclass(default):
            rows += describe(type(default), f"{prefix}{f.name}.")
        else:
            shown = "null" if default is None else str(default)
            rows.append((prefix + f.name, shown, texts.get(f.name, "")))
        if elements:
            rows += describe(elements, f"{prefix}{f.name}[].")
    return rows

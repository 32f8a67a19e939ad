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
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bupo.config.errors import ConfigError, first_line, require

Settings = TypeVar("Settings")
"""A dataclass of settings: values, and dataclasses as groups of them"""


QUOTES = "in a shell, quote what has spaces or braces: 'data.columns={prompt: question}'"
"""For errors, and for the help of key=value"""


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
            given = OmegaConf.load(file)
            _check_names(OmegaConf.to_container(given), schema, schema)
            merged = OmegaConf.merge(merged, given)
        for text in overrides:
            reading = text
            require(text.find("=") > 0, f"expected key=value, got {text!r}{_split_by_shell(text)}")
            given = OmegaConf.from_dotlist([text])
            _check_names(OmegaConf.to_container(given), schema, schema, text.partition("=")[0])
            merged = OmegaConf.merge(merged, given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or reading
        raise ConfigError(f"{where}: {first_line(error)}") from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{reading} cannot be read: {text}{_split_by_shell(reading)}") from None
    except (ValueError, TypeError) as error:  # from OmegaConf: a value of the wrong structure
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{reading}: {first_line(error)}") from None
    assert isinstance(config, schema)
    for key, value in values(config).items():
        if isinstance(value, float) and not math.isfinite(value) and "clip" not in key:
            raise ConfigError(f"{key} must be finite, got {value}")
    return config


def _check_names(
    given: Any, schema: type, root: type, typed: str | None = None, prefix: str = ""
) -> None:
    """Raises ConfigError for a key that is none, naming the nearest: of the dotted key as it was
    typed, else of the group or key of a file."""
    if not isinstance(given, dict):  # OmegaConf says what is wrong with that
        return
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        f = known.get(key)
        if f is None:
            whole = typed if typed and typed.startswith(name) else name
            near = _nearest(whole, root)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"unknown key {whole}{hint}")
        elements = _elements(schema, f)
        if is_dataclass(_default(f)):
            _check_names(value, type(_default(f)), root, typed, f"{name}.")
        elif elements:
            for each in value if isinstance(value, list) else []:
                _check_names(each, elements, root, None, f"{name}[].")


def _nearest(name: str, schema: type) -> list[str]:
    keys = all_keys(schema)
    in_groups = [key for key in keys if key.rpartition(".")[2] == name]
    groups = {key.rpartition(".")[0] for key in keys if "." in key and "[]" not in key}
    return in_groups or difflib.get_close_matches(name, [*keys, *groups], n=1, cutoff=0.5)


def _split_by_shell(text: str) -> str:
    """A hint for a list or object that was cut at its spaces, and for what was cut off."""
    opened, closed = (sum(map(text.count, brackets)) for brackets in ("[{", "]}"))
    return "" if opened == closed else f"; {QUOTES}"


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
    try:
        old = values(read(file, [], type(config)))
    except ConfigError as error:
        raise ConfigError(f"{file}, which is compared with, cannot be read: {error}") from None
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

"""Settings from YAML and `key=value`, strict about names, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bupo.config.algorithms import take_algorithm
from bupo.config.errors import ConfigError, first_line, require
from bupo.config.other_names import our_name
from bupo.config.schema import all_keys, default_of, elements_of, nearest, values

Settings = TypeVar("Settings")
"""A dataclass of settings: values, and dataclasses as groups of them"""


QUOTES = "in a shell, quote what has spaces or braces: 'data.columns={prompt: question}'"
"""For errors, and for the help of key=value"""


def shipped(name: str) -> Path:
    """The file of that name, or the one that comes with bupo among its recipes."""
    package = Path(__file__).parent.parent
    beside = (package / "recipes" / name, package.parent / "recipes" / name)
    return next((path for path in (Path(name), *beside) if path.is_file()), Path(name))


def read(file: Path | None, overrides: list[str], schema: type[Settings]) -> Settings:
    """The settings of a YAML file, replaced by `key=value` overrides.

    Short forms are taken as meant: `algorithm=NAME` (see bupo.config.algorithms; that of the
    overrides replaces that of the file), `model=NAME`, and one string for a list of strings.

    Raises ConfigError, one line: an unknown key (naming the one that is meant), a value of the wrong
    type, a missing file, an impossible combination.
    """
    of_file: dict[str, Any] = {}
    typed: list[dict[str, Any]] = []
    if file is not None:
        with _one_line(str(file)):
            require(file.is_file(), f"configuration file not found: {file}")
            of_file = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
            require(isinstance(of_file, dict), f"{file} holds a list, expected `key: value`")
            of_file = _as_meant(of_file, schema, schema)
    for text in overrides:
        with _one_line(text):
            require(text.find("=") > 0, f"expected key=value, got {text!r}{_split_by_shell(text)}")
            given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
            typed.append(_as_meant(given, schema, schema, text.partition("=")[0]))
    below, above = take_algorithm([of_file]), take_algorithm(typed)
    layers = [(str(file), {} if above else below), (str(file), of_file), ("algorithm", above)]
    merged, reading = OmegaConf.structured(schema), str(file)
    for reading, given in [*layers, *zip(overrides, typed)]:
        with _one_line(reading):
            merged = OmegaConf.merge(merged, given)
    with _one_line(reading):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    return config


@contextmanager
def _one_line(reading: str) -> Iterator[None]:
    """Around what reads a file or a `key=value`: ConfigError, one line, for whatever goes wrong."""
    try:
        yield
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


def _as_meant(
    given: dict[str, Any], schema: type, root: type, typed: str | None = None, prefix: str = ""
) -> dict[str, Any]:
    """Settings with their short forms written out; OmegaConf says what is wrong with a value.

    Raises ConfigError for a key that is none: the dotted key as it was typed, else the group or key
    of a file.
    """
    known, hints = {f.name: f for f in fields(schema)}, get_type_hints(schema)
    found: dict[str, Any] = {}
    for key, value in given.items():
        name, f = f"{prefix}{key}", known.get(key)
        if f is None:
            short = name == "algorithm" and "policy" in known and not isinstance(value, dict)
            if not short:
                whole = typed if typed and typed.startswith(name) else name
                raise ConfigError(_unknown(whole, {} if whole == typed else value, root))
        elif is_dataclass(group := default_of(f)):
            if name == "model" and isinstance(value, str):
                value = {"path": value}
            if isinstance(value, dict):
                value = _as_meant(value, type(group), root, typed, f"{name}.")
        elif elements := elements_of(schema, f):
            for n, each in enumerate(value if isinstance(value, list) else []):
                if isinstance(each, dict):
                    value[n] = _as_meant(each, elements, root, None, f"{name}[].")
        elif hints[key] == list[str] and isinstance(value, str) and not value.endswith("}"):
            value = [value]  # "${...}" may stand for a list
        found[key] = value
    return found


def _unknown(name: str, value: Any, schema: type) -> str:
    """The error for a key that is none, or for the first one in its group that another trainer
    has."""
    left, keys = [(name, value)], all_keys(schema)
    while left:
        key, inner = left.pop(0)
        if hint := our_name(key, keys):
            return f"unknown key {key}; {hint}"
        left += [(f"{key}.{k}", v) for k, v in inner.items()] if isinstance(inner, dict) else []
    near = nearest(name, schema)
    return f"unknown key {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _split_by_shell(text: str) -> str:
    """A hint for a list or object that was cut at its spaces, and for what was cut off."""
    opened, closed = (sum(map(text.count, brackets)) for brackets in ("[{", "]}"))
    return "" if opened == closed else f"; {QUOTES}"


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

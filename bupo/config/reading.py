"""Reads settings from YAML and `key=value`, strictly by name, and writes them as YAML.

The text under a field is its help, which `--help` prints.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bupo.config.errors import ConfigError, first_line, one_of, require
from bupo.config.objective import ALGORITHMS
from bupo.config.other_names import our_name

Settings = TypeVar("Settings")
"""A dataclass of settings, whose fields are values or dataclasses (groups of settings)"""

QUOTES = "in a shell, quote what has spaces or braces: 'data.columns={prompt: question}'"
"""Hint for errors and for the help of key=value"""


def shipped(name: str) -> Path:
    """Returns the file of that name if it exists, else the one among bupo's recipes."""
    package = Path(__file__).parent.parent
    beside = (package / "recipes" / name, package.parent / "recipes" / name)
    return next((path for path in (Path(name), *beside) if path.is_file()), Path(name))


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def _elements(schema: type, f: Field[Any]) -> type | None:
    """Returns the dataclass of the elements of a list of settings, or None for other fields."""
    found = next(iter(get_args(get_type_hints(schema)[f.name])), None)
    return found if isinstance(found, type) and is_dataclass(found) else None


def read(file: Path | None, overrides: list[str], schema: type[Settings]) -> Settings:
    """Reads the settings of a YAML file and of `key=value` overrides, which take precedence.

    Short forms are allowed: model=NAME, one string for a list of strings, and algorithm=NAME, which
    stands for the settings ALGORITHMS[NAME]. The last algorithm=NAME counts. As an override, it
    replaces settings of a file. Settings from the same file or overrides take precedence over it.

    Raises ConfigError with one line for an unknown key (suggesting a known one), a value of the
    wrong type, a missing file or an impossible combination.
    """
    reading, merged = str(file), OmegaConf.structured(schema)
    of_file: Any = {}
    typed: list[Any] = []
    try:
        if file is not None:
            require(file.is_file(), f"configuration file not found: {file}")
            of_file = OmegaConf.to_container(OmegaConf.load(file))
            require(isinstance(of_file, dict), f"{file} holds a list, expected key: value")
            of_file = _as_meant(of_file, schema, schema)
        for reading in overrides:
            hint = _split_by_shell(reading)
            require(reading.find("=") > 0, f"expected key=value, got {reading!r}{hint}")
            given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([reading]))
            typed.append(_as_meant(given, schema, schema, reading.partition("=")[0]))
        below, above = _of_algorithm([of_file]), _of_algorithm(typed)
        layers = [{} if above else below, of_file, above]
        reading = str(file)
        merged = OmegaConf.merge(merged, *layers)
        for reading, given in zip(overrides, typed):  # noqa: B007
            merged = OmegaConf.merge(merged, given)
        config = OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or reading
        raise ConfigError(f"{where}: {first_line(error)}") from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{reading} cannot be read: {text}{_split_by_shell(reading)}") from None
    except (ValueError, TypeError) as error:  # OmegaConf's, for a value of the wrong structure
        raise ConfigError(f"{reading}: {first_line(error)}") from None
    assert isinstance(config, schema)
    return config


def _as_meant(
    given: dict[str, Any], schema: type, root: type, typed: str = "", prefix: str = ""
) -> dict[str, Any]:
    """Returns settings with their short forms written out. Values are checked later, by OmegaConf.

    Raises ConfigError for an unknown key. It names the dotted key as typed, or else the group or
    key of a file.
    """
    known, types = {f.name: f for f in fields(schema)}, get_type_hints(schema)
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if name == "algorithm" and "policy" in known and not isinstance(value, dict):
            found[key] = value
            continue
        if key not in known:
            whole = typed if typed.startswith(name) else name
            raise ConfigError(_unknown(whole, value if whole == name else {}, root))
        group, elements = _default(known[key]), _elements(schema, known[key])
        if name == "model" and isinstance(value, str):
            value = {"path": value}
        elif types[key] == list[str] and isinstance(value, str) and not value.endswith("}"):
            value = [value]  # "${...}" may stand for a list
        if is_dataclass(group) and isinstance(value, dict):
            value = _as_meant(value, type(group), root, typed, f"{name}.")
        elif elements and isinstance(value, list):
            dicts = (each if isinstance(each, dict) else {} for each in value)
            meant = [_as_meant(each, elements, root, "", f"{name}[].") for each in dicts]
            value = [new or each for new, each in zip(meant, value)]
        found[key] = value
    return found


def _of_algorithm(given: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Removes `algorithm` from the settings of one command line or file, and returns the settings
    that it stands for. Raises ConfigError for an unknown name and for a contradicting policy."""
    names = [settings.pop("algorithm") for settings in given if "algorithm" in settings]
    if not names:
        return {}
    one_of("algorithm", names[-1], tuple(ALGORITHMS))
    implied = ALGORITHMS[names[-1]]
    policy = [implied["policy"], *(each["policy"] for each in given if "policy" in each)][-1]
    if policy != implied["policy"]:
        raise ConfigError(
            f"algorithm={names[-1]} means policy={implied['policy']}, but policy={policy} is given "
            "as well: leave one of them out"
        )
    return implied


def _unknown(name: str, value: Any, schema: type) -> str:
    """Returns the error for an unknown key. If the key, or one in its group, belongs to another
    trainer, it names our key; else the keys of that name in any group, or the most similar key."""
    keys = all_keys(schema)
    left = [(name, value)]
    for key, inner in left:
        if text := our_name(key, keys):
            return f"unknown key {key}; {text}"
        left += [(f"{key}.{k}", v) for k, v in inner.items()] if isinstance(inner, dict) else []
    in_groups = [key for key in keys if key.rpartition(".")[2] == name]
    groups = {key.rpartition(".")[0] for key in keys if "." in key and "[]" not in key}
    short = ["algorithm"] * ("policy" in keys)
    alike = difflib.get_close_matches(name, [*keys, *groups, *short], n=1, cutoff=0.5)
    near = " or ".join(in_groups or alike)
    return f"unknown key {name}" + (f"; did you mean {near}?" if near else "")


def _split_by_shell(text: str) -> str:
    """Returns a hint if brackets do not match, since the shell has then split a list or object."""
    opened, closed = (sum(map(text.count, brackets)) for brackets in ("[{", "]}"))
    return "" if opened == closed else f"; {QUOTES}"


def values(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every dotted key and its value."""
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            found |= values(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value
    return found


def changes_since(file: Path, config: Any, may_change: tuple[str, ...]) -> list[str]:
    """Returns `key: old -> new` for every setting that differs from those of a file, except for
    keys that begin with one of `may_change`. Raises ConfigError if the file cannot be read."""
    try:
        old = values(read(file, [], type(config)))
    except ConfigError as error:
        raise ConfigError(f"{file} (the earlier settings) cannot be read: {error}") from None
    return [
        f"{key}: {old[key]} -> {value}"
        for key, value in values(config).items()
        if value != old[key] and not key.startswith(may_change)
    ]


def dump(config: Any) -> str:
    """Returns the settings as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def all_keys(schema: type) -> list[str]:
    """Returns the dotted keys of all values, those of a list's elements as `phases[].layer`."""
    return [key for key, _, _ in describe(schema)]


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Returns (key, default, help) of every key, with the help from the text under each field."""
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

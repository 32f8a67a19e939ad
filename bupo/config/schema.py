"""What the dataclasses of settings say of themselves: keys, defaults, help, values.

The text under a field is its help; `--help` prints it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_type_hints


def default_of(f: Field[Any]) -> Any:
    """The default of a field; of a group of settings, the group."""
    return f.default_factory() if callable(f.default_factory) else f.default


def elements_of(schema: type, f: Field[Any]) -> type | None:
    """The dataclass that a list of settings is made of; None for another field."""
    found = next(iter(get_args(get_type_hints(schema)[f.name])), None)
    return found if isinstance(found, type) and is_dataclass(found) else None


def all_keys(schema: type) -> list[str]:
    """Every dotted key; those of a list's elements as `phases[].layer`."""
    return [key for key, _, _ in describe(schema)]


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


def nearest(name: str, schema: type) -> list[str]:
    """The keys that are likely meant: those of that name in any group, else the one that is spelled
    most alike."""
    keys = all_keys(schema)
    in_groups = [key for key in keys if key.rpartition(".")[2] == name]
    groups = {key.rpartition(".")[0] for key in keys if "." in key and "[]" not in key}
    short = ["algorithm"] * ("policy" in keys)
    return in_groups or difflib.get_close_matches(name, [*keys, *groups, *short], n=1, cutoff=0.5)


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
        default, elements = default_of(f), elements_of(schema, f)
        if is_dataclass(default):
            rows += describe(type(default), f"{prefix}{f.name}.")
        else:
            shown = "null" if default is None else str(default)
            rows.append((prefix + f.name, shown, texts.get(f.name, "")))
        if elements:
            rows += describe(elements, f"{prefix}{f.name}[].")
    return rows

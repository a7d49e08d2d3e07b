"""Frozen dataclasses <-> ConfigDict, and choices written on one line of a command.

Library code takes frozen dataclasses. Config files and flags hold ConfigDicts, which can be
overridden field by field and printed. This module is the door between the two, in both directions:

    to_config(LMInfinite(window=64, sinks=4))   -> {class: LMInfinite, window: 64, sinks: 4}
    from_config(section, LMInfinite | Window)   -> LMInfinite(window=64, sinks=4)
    parse_choice("lm_infinite:window=64,sinks=4", POLICIES) -> the same value

Every field of a section reaches the value or is an error, so a setting that nobody reads cannot
exist; a mistyped name is answered with the closest valid one.
"""

import dataclasses
import difflib
import importlib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ml_collections import config_dict

from lminf.errors import InputError

CLASS = "class"  # the key of a section that says which dataclass it describes

Expected = Any  # a dataclass, a union of them, or a mapping from names to them


def closest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: which of `options` was probably meant, or all of them."""
    options = [str(option) for option in options]
    folded = {option.lower().replace("-", "_"): option for option in options}
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.55)
    listed = ", ".join(options) if options else "nothing"
    return f"did you mean {folded[matches[0]]!r}? (of {listed})" if matches else f"use {listed}"


def signature(kind: type, name: str | None = None) -> str:
    """`lm_infinite(window: int, sinks: int = 4)`: a dataclass's fields with types and defaults."""
    hints = typing.get_type_hints(kind)
    parts = []
    for field in _init_fields(kind):
        default = "" if _required(field) else f" = {_written(_default(field))}"
        parts.append(f"{field.name}: {_spell(hints[field.name])}{default}")
    return f"{name or kind.__name__}({', '.join(parts)})"


# --- Dataclass <-> ConfigDict ---------------------------------------------------------------------


def to_config(value: Any) -> config_dict.ConfigDict:
    """The dataclass instance as a ConfigDict: its fields, and its class's name under `class`."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"to_config takes a dataclass instance, not {value!r}")
    hints = typing.get_type_hints(type(value))
    config = config_dict.ConfigDict({CLASS: type(value).__name__})
    for field in _init_fields(type(value)):
        config[field.name] = _store(getattr(value, field.name), hints[field.name])
    return config


def _store(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_config(value)
    if isinstance(value, tuple):
        return tuple(_store(item, Any) for item in value)
    if value is None:
        # A bare None has type NoneType for ever; a placeholder remembers what may replace it.
        scalars = [member for member in _members(hint) if member in (int, float, str, bool, tuple)]
        return config_dict.placeholder(scalars[0]) if scalars else None
    return value


def from_config(config: Mapping | config_dict.ConfigDict, expected: Expected) -> Any:
    """The dataclass instance that a section describes; `expected` is what it may be an instance of.

    `expected` is one dataclass, a union of dataclasses, or a mapping from names to dataclasses.
    Raises InputError for an unknown class or field, a missing field or a value of the wrong type.
    """
    return _from_section(config, _candidates(expected), "config")


def _from_section(config: Any, candidates: Mapping[str, type], where: str) -> Any:
    if not isinstance(config, (Mapping, config_dict.ConfigDict)):
        raise InputError(
            f"{where} is {config!r}, not a section; it describes one of {', '.join(candidates)}"
        )
    section = {key: config[key] for key in config}
    kind = _chosen_class(section.pop(CLASS, None), candidates, where)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in _init_fields(kind)}
    for name in section:
        if name not in fields:
            raise InputError(
                f"{where} has a field {name!r} that {kind.__name__} does not know; "
                f"{closest(name, fields)}"
            )
    missing = [name for name, field in fields.items() if name not in section and _required(field)]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}; it describes {signature(kind)}")
    values = {
        name: _from_stored(value, hints[name], candidates, f"{where}.{name}")
        for name, value in section.items()
    }
    return _construct(kind, values, where)


def _chosen_class(name: Any, candidates: Mapping[str, type], where: str) -> type:
    if name is None:
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        raise InputError(f"{where} lacks {CLASS!r}; use one of {', '.join(candidates)}")
    for key, kind in candidates.items():
        if name in (key, kind.__name__):
            return kind
    raise InputError(f"{where}.{CLASS} is {name!r}; {closest(str(name), candidates)}")


def _from_stored(value: Any, hint: Any, candidates: Mapping[str, type], where: str) -> Any:
    if isinstance(value, (Mapping, config_dict.ConfigDict)):
        return _from_section(value, _nested(hint, candidates), where)
    if isinstance(value, (tuple, list)):
        items = tuple(value)
        hint = next((member for member in _members(hint) if _origin(member) is tuple), hint)
        hints = _item_hints(hint, len(items), where)
        return tuple(
            _from_stored(item, of, candidates, f"{where}[{index}]")
            for index, (item, of) in enumerate(zip(items, hints, strict=True))
        )
    for member in _members(hint):
        if _fits(value, member):
            return float(value) if member is float else value
    raise InputError(f"{where} is {value!r}, but it takes {_spell(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is types.NoneType:
        return value is None
    if _origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # A field typed by a protocol or a callable is checked by whoever calls it.
    return isinstance(value, hint) if hint in (bool, str, tuple) else hint is not bool


# --- name:field=value,field=value -----------------------------------------------------------------


def parse_choice(text: str, choices: Mapping[str, type], *, what: str = "choice") -> Any:
    """The dataclass instance that `name` or `name:field=value,…` describes.

    Values are read by the type of their field: numbers, `true`, `false`, `none`, words, tuples as
    `(1,2)`. A field that is itself a choice takes `name` or `(name:field=value,…)`.
    """
    name, colon, rest = text.strip().partition(":")
    name = name.strip()
    if name not in choices:
        raise InputError(f"no {what} is called {name!r}; {closest(name, choices)}")
    kind = choices[name]
    if colon and not rest.strip():
        raise InputError(f"{text!r} ends in a colon; write {signature(kind, name)} or {name!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in _init_fields(kind)}
    values: dict[str, Any] = {}
    for part in _split(rest, text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key:
            raise InputError(f"{part!r} in {text!r} is not field=value; {signature(kind, name)}")
        if key not in fields:
            hint = closest(key, fields) if fields else "it has no fields"
            raise InputError(f"{name} has no field {key!r}; {hint}; {signature(kind, name)}")
        if key in values:
            raise InputError(f"{key!r} is given twice in {text!r}; give it once")
        values[key] = _parse_value(value, hints[key], choices, f"{name}.{key}")
    missing = [key for key, field in fields.items() if key not in values and _required(field)]
    if missing:
        raise InputError(f"{text!r} lacks {', '.join(missing)}; {signature(kind, name)}")
    return _construct(kind, values, repr(text))


def split_choices(text: str) -> list[str]:
    """`a,b:x=1,y=2` as `a` and `b:x=1,y=2`: field=value belongs to the choice before it."""
    written: list[str] = []
    for part in _split(text, text):
        if written and re.match(r"\s*\w+\s*=", part):
            written[-1] += f",{part}"
        else:
            written.append(part.strip())
    return written


def import_choices(
    text: str, choices: Mapping[str, type], *, base: type
) -> tuple[str, dict[str, type]]:
    """The text and the choices for parse_choice, with the classes in files of the user's own that
    the text names as `module:Class`. They are dataclasses that derive from `base`, and their
    modules are imported, from the current folder too.
    """
    known = dict(choices)

    def imported(match: re.Match[str]) -> str:
        module, name = match.groups()
        if module in choices:
            return match[0]
        known[f"{module}.{name}"] = _imported(module, name, choices, base)
        return f"{module}.{name}"

    # A class, and not a field: those are followed by `=`.
    of_module = r"(?<![\w.=])([A-Za-z_][\w.]*):([A-Za-z_]\w*)(?=[:,)\s]|$)"
    return re.sub(of_module, imported, text), known


def _imported(module: str, name: str, choices: Mapping[str, type], base: type) -> type:
    what = base.__name__.lower()
    sys.path.insert(0, os.getcwd())  # where a command of its own does not look
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise InputError(
            f"no {what} is called {module!r} and no module of that name can be imported "
            f"({type(error).__name__}: {error}); {closest(module, choices)}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise InputError(
            f"{module} has no {what} {name!r}; give a class that derives from {base.__name__}"
        )
    if "__dataclass_fields__" not in vars(kind):
        raise InputError(f"{module}:{name} is no dataclass; put @dataclass(frozen=True) above it")
    return kind


def _split(text: str, whole: str) -> list[str]:
    """The parts between commas that are not inside parentheses."""
    if not text.strip():
        return []
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    if depth != 0:
        raise InputError(f"the parentheses in {whole!r} do not match")
    last = text[start:]
    return [*parts, last] if last.strip() else parts  # `(1,)` has one item


def _parse_value(text: str, hint: Any, choices: Mapping[str, type], where: str) -> Any:
    # Most specific first, so that `int | str` reads 12 as a number.
    for member in sorted(_members(hint), key=_specificity):
        parsed, value = _parse_as(text, member, choices, where)
        if parsed:
            return value
    nested = _nested(hint, choices) if any(map(_is_choice, _members(hint))) else {}
    if nested:
        return parse_choice(text[1:-1] if _parenthesised(text) else text, nested)
    words = [str(option) for member in _members(hint) for option in _options(member)]
    suggestion = f"; {closest(text, words)}" if words else ""
    raise InputError(f"{where} takes {_spell(hint)}, not {text!r}{suggestion}")


def _parse_as(text: str, hint: Any, choices: Mapping[str, type], where: str) -> tuple[bool, Any]:
    """Whether `text` is a value of the plain type `hint`, and which."""
    if hint is types.NoneType:
        return text.lower() == "none", None
    if hint is bool:
        return text.lower() in ("true", "false"), text.lower() == "true"
    if hint in (int, float):
        try:
            number = hint(text)
            return math.isfinite(number), number
        except (ValueError, OverflowError):  # no number, or a whole one that no float holds
            return False, None
    if hint is str:
        return True, text
    if _origin(hint) is Literal:
        named = {str(option): option for option in typing.get_args(hint)}
        return text in named, named.get(text)
    if _origin(hint) is tuple and _parenthesised(text):
        items = [item.strip() for item in _split(text[1:-1], text)]
        hints = _item_hints(hint, len(items), where)
        return True, tuple(
            _parse_value(item, of, choices, f"{where}[{index}]")
            for index, (item, of) in enumerate(zip(items, hints, strict=True))
        )
    return False, None


def _parenthesised(text: str) -> bool:
    return text.startswith("(") and text.endswith(")")


def _specificity(hint: Any) -> int:
    order = [types.NoneType, bool, int, float]
    return order.index(hint) if hint in order else (9 if hint is str else 5)


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if _origin(hint) is Literal else ()


# --- Types ----------------------------------------------------------------------------------------


def _construct(kind: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except InputError:
        raise
    except ValueError as error:  # the dataclass's own checks
        raise InputError(f"{where}: {error}") from error


def _init_fields(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _required(field: dataclasses.Field) -> bool:
    nothing = dataclasses.MISSING
    return field.default is nothing and field.default_factory is nothing


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if callable(field.default_factory) else None


def _written(value: Any) -> str:
    """A value as parse_choice reads it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _members(hint: Any) -> Sequence[Any]:
    """The alternatives of a union; the hint itself if it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in _members(member)]
    return [hint]


def _candidates(expected: Expected) -> dict[str, type]:
    """The dataclasses among the alternatives, by name."""
    if isinstance(expected, Mapping):
        return dict(expected)
    kinds = [member for member in _members(expected) if dataclasses.is_dataclass(member)]
    return {kind.__name__: kind for kind in kinds if isinstance(kind, type)}


def _is_choice(hint: Any) -> bool:
    """Whether values of this type are written as a choice: a class, but not a plain one."""
    return isinstance(hint, type) and hint not in (types.NoneType, bool, int, float, str, tuple)


def _nested(hint: Any, outer: Mapping[str, type]) -> dict[str, type]:
    """What a field inside a choice may be: the outer choices that fit its type, and the dataclasses
    that the type names itself."""
    classes = [member for member in _members(hint) if _is_choice(member)]
    # A protocol says nothing about names: every outer choice may satisfy it.
    open_ended = not classes or any(getattr(member, "_is_protocol", False) for member in classes)
    fitting = {n: kind for n, kind in outer.items() if open_ended or issubclass(kind, (*classes,))}
    leftover = {n: kind for n, kind in _candidates(hint).items() if kind not in fitting.values()}
    return fitting | leftover


def _item_hints(hint: Any, count: int, where: str) -> Sequence[Any]:
    arguments = typing.get_args(hint)
    if not arguments or _origin(hint) is not tuple:
        return [Any] * count
    if arguments[-1] is Ellipsis:
        return [arguments[0]] * count
    if len(arguments) != count:
        raise InputError(f"{where} has {count} items, but it takes {_spell(hint)}")
    return arguments


def _spell(hint: Any) -> str:
    members = _members(hint)
    if len(members) > 1:
        return " | ".join(_spell(member) for member in members)
    if hint is types.NoneType:
        return "none"
    if _origin(hint) is Literal:
        return " | ".join(str(option) for option in typing.get_args(hint))
    if _origin(hint) is tuple and typing.get_args(hint):
        inner = ["…" if item is Ellipsis else _spell(item) for item in typing.get_args(hint)]
        return f"({', '.join(inner)})"
    return getattr(hint, "__name__", str(hint))

"""Configuration dataclasses as YAML files and as command-line flags: one list of fields, one set of messages.

A configuration class documents its fields as `name: text` lines in its docstring; those lines are the flags' help.
"""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Container
from pathlib import Path

import yaml

from encoder.errors import DataError


def field_help(cls: type) -> dict[str, str]:
    """The `name: text` lines in the docstrings of a configuration class and its bases, continuation lines joined."""
    names = {field.name for field in dataclasses.fields(cls)}
    texts, current = {}, []
    lines = (line for base in reversed(cls.__mro__) for line in ["", *(base.__doc__ or "").splitlines()])
    for line in lines:
        start = re.match(r"\s*((?:\w+, )*\w+): (.*)", line)
        if start and set(start[1].split(", ")) <= names:
            current = start[1].split(", ")
            texts |= dict.fromkeys(current, start[2].strip())
        elif current and line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in current}
        else:
            current = []
    return texts


def _options(annotation) -> list:
    """The types that a field may have, None left out."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return [option for option in options if option is not types.NoneType]


def _parse_value(annotation, text: str, name: str):
    """A flag's text as the field's type, the first where there are several; `none` where the type allows it."""
    if isinstance(annotation, types.UnionType):
        if text.lower() == "none":
            return None
        annotation = _options(annotation)[0]
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"--{name} is '{text}'; write true or false")
        return text.lower() == "true"
    if annotation is int:
        return int(float(text)) if float(text).is_integer() else int(text)
    return annotation(text)


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    title: str | None = None,
    names: Container[str] | None = None,
    remark: str = "",
) -> None:
    """One flag per field of `cls`; a flag left out is absent from the namespace, so a file's value is kept.

    names: of the fields that become flags; None is all of them
    remark: follows each default in the help
    """
    group, texts = parser.add_argument_group(title or cls.__name__), field_help(cls)
    for field in dataclasses.fields(cls):
        if names is not None and field.name not in names:
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options = _options(field.type)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        note = "required" if required else f"default {default}{remark}"
        text = f"{texts.get(field.name, '')} ({note})".replace("%", "%%")
        is_list = any(typing.get_origin(option) is list for option in options)
        item = typing.get_args(field.type)[0] if len(options) == 1 and is_list else field.type

        def parse(value, item=item, name=field.name):
            return _parse_value(item, value, name)

        parse.__name__ = getattr(item, "__name__", str(item))
        more = {"nargs": "+"} if is_list else {}
        group.add_argument(f"--{field.name}", type=parse, default=argparse.SUPPRESS, help=text, metavar="X", **more)


def read_recipe(path: str | Path, known: set[str]) -> dict:
    """A YAML recipe as a dictionary; a field that is not `known` is refused with its nearest valid name."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"recipe {path} does not exist; see scripts/recipes for those that do")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise DataError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise DataError(f"recipe {path} holds a {type(values).__name__}; write one 'field: value' a line")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known fields: {', '.join(sorted(known))}"
            raise DataError(f"recipe {path}: field '{key}' is not known; {hint}")
    return values


def build(cls: type, values: dict):
    """The subset of `values` that are fields of `cls`, as an instance; a missing required field is named."""
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise DataError(f"'{field.name}' is not given; set it in the recipe or with --{field.name}")
    return cls(**typed_values(cls, values))


def typed_values(cls: type, values: dict) -> dict:
    """The subset of `values` that are fields of `cls`, each as its field's type."""
    types_of = {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: _checked(types_of[name], value, name) for name, value in values.items() if name in types_of}


WORDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", list: "a list"}


def _checked(annotation, value, name: str):
    """`value` as the field's type; a value of another kind is refused. YAML reads 1e-3 as a string: numbers may be text."""
    if isinstance(annotation, types.UnionType):
        options = _options(annotation)
        if isinstance(value, list) and len(value) == 1 and len(options) > 1:  # of a flag that takes one or several
            value = value[0]
        if value is None:
            return None
        annotation = options[-1] if isinstance(value, list) else options[0]
        if isinstance(value, list) and len(options) > 1:
            return [_checked(options[0], item, name) for item in value]
    kind = typing.get_origin(annotation) or annotation
    if kind in (float, int):
        number = _number(value)
        if number is not None and (kind is float or number.is_integer()):
            return value if type(value) is kind else kind(number)
    elif kind is list and isinstance(value, list | tuple):
        return list(value)
    elif kind not in WORDS or isinstance(value, kind):
        return value
    raise DataError(f"'{name}' is '{value}'; {WORDS[kind]} is needed")


def _number(value) -> float | None:
    """A number or its text as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None

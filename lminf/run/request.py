"""A command line -> what it asks for: an experiment's config, its overrides and the run's folder.

--config=FILE.py:variant  --config.FIELD=VALUE  --out=DIR  --debug  --help
"""

import ast
import contextlib
import importlib.util
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import config_flags

from lminf.config import CLASS, closest
from lminf.errors import InputError
from lminf.ranges import shown
from lminf.run import header, settings


@dataclass(frozen=True)
class Request:
    """What one command line asks for."""

    experiment: str
    config: ConfigDict
    config_path: Path
    variant: str  # "" is the full form
    overrides: Mapping[str, Any]
    out: Path | None  # the run's folder; None: a new one below runs/

    def resolved(self) -> dict[str, Any]:
        """The configuration as plain dictionaries, lists and scalars, ready for JSON."""
        return to_dict(self.config)


def parse(experiment: str, arguments: Sequence[str]) -> Request | None:
    """What the arguments ask for; None when they ask for help, which is then printed."""
    arguments = list(arguments)
    path, variant = find_config(experiment, take(arguments, "config"))
    config = load_config(path, variant)
    check_names(experiment, path, config)
    refuse_repeats(arguments, config)
    if {"--help", "-h", "-help"} & set(arguments):
        show_help(experiment, path, config)
        return None
    check_overrides(arguments, config)
    emptied = take_none(arguments, config)
    arguments = [quote_words(argument, config) for argument in arguments]
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the run's folder", flag_values=values)
    flags.DEFINE_boolean("debug", False, "show a traceback with an error", flag_values=values)
    defaults = dict(leaves(config))
    try:
        overridden = config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=[experiment, *arguments]
        )
        rest = values([experiment, *arguments])[1:]
    except Exception as error:  # of absl, and of what reads a value's Python text
        raise InputError(" ".join(str(error).split()) + "; --help lists what there is") from error
    if rest:
        raise InputError(
            f"{rest[0]!r} is not a flag; an override is written --config.FIELD=VALUE, a variant "
            f"--config={experiment}:VARIANT"
        )
    if values.out == "":
        raise InputError("--out is empty; name a folder, or leave it out")
    config_flag: Any = values["config"]  # absl knows it only as some flag
    overrides = dict(config_flag.override_values) | dict.fromkeys(emptied)
    check_items(overrides, defaults)
    settings.check(overridden.value, experiment=experiment)
    return Request(
        experiment=experiment,
        config=overridden.value,
        config_path=path,
        variant=variant,
        overrides=overrides,
        out=Path(values.out) if values.out else None,
    )


def refuse_repeats(arguments: Sequence[str], config: ConfigDict) -> None:
    """Refuses a flag that is given twice: the first of its values would be lost.

    The values of a field of the config that is a tuple are joined.
    """
    joined = {f"config.{name}" for name, value in leaves(config) if isinstance(value, tuple)}
    names = [a.partition("=")[0].lstrip("-") for a in arguments if re.match("--?[A-Za-z]", a)]
    twice = next((name for name in names if names.count(name) > 1 and name not in joined), None)
    if twice:
        raise InputError(f"--{twice} is given twice; give it once")


def take(arguments: list[str], name: str) -> str | None:
    """Removes `--name=value` or `--name value`, given once, from the arguments; its value."""
    value = None
    position = 0
    while position < len(arguments):
        flag, equals, text = arguments[position].partition("=")
        if flag not in (f"--{name}", f"-{name}"):
            position += 1
            continue
        if not equals and position + 1 == len(arguments):
            raise InputError(f"--{name} needs a value, as in --{name}=FILE.py:variant")
        if value is not None:
            raise InputError(f"--{name} is given twice; give it once")
        value = text if equals else arguments[position + 1]
        if not value:
            raise InputError(f"--{name} is empty; give a value, or leave it out")
        del arguments[position : position + (1 if equals else 2)]
    return value


def find_config(experiment: str, given: str | None) -> tuple[Path, str]:
    """The config file and its variant: `FILE.py:variant`, `NAME:variant`, `:variant`, or nothing.

    A relative FILE is looked for from here, then from the repository, so that the commands of the
    documentation work in any directory.
    """
    file, _, variant = (given or "").partition(":")
    if not file:
        file = experiment
    if file.endswith(".py"):
        places = [Path(file), header.ROOT / file]
    else:
        places = [header.CONFIGS / f"{file}.py"]
    for path in places:
        is_there = False
        with contextlib.suppress(OSError, ValueError):  # no name that a file can have
            is_there = path.is_file()
        if is_there:
            _same_experiment(experiment, path)
            return path, variant
    stems = [path.stem for path in sorted(header.CONFIGS.glob("[!_]*.py"))]
    raise InputError(f"there is no config file {shown(file)}; {closest(Path(file).stem, stems)}")


def _same_experiment(experiment: str, path: Path) -> None:
    """Refuses the config of another experiment, whose fields are others."""
    ours = header.CONFIGS / f"{experiment}.py"
    foreign = path.resolve().parent == header.CONFIGS.resolve() and path.stem != experiment
    if foreign and ours.is_file() and "Question" in header.read(path).entries:
        raise InputError(
            f"{path.name} is the config of the experiment {path.stem}, not of {experiment}; give "
            f"--config={experiment}:VARIANT, or a file of your own"
        )


def check_names(experiment: str, path: Path, config: ConfigDict) -> None:
    """Refuses a config file of somebody's own whose fields are not those that the experiment reads:
    nothing would read one, or a long run would end where another is missing.
    """
    ours = header.CONFIGS / f"{experiment}.py"
    if not ours.is_file() or path.resolve() == ours.resolve():
        return
    names, read = dict(leaves(config)), dict(leaves(load_config(ours, "")))
    for name in names:
        if name not in read and not _is_class(name):
            raise InputError(f"{path}: {experiment} reads no config.{name}; {closest(name, read)}")
    for name in read:
        if name not in names and not _is_class(name):
            raise InputError(f"{path}: config.{name} is missing, which {experiment} reads")


def load_config(path: Path, variant: str) -> ConfigDict:
    """What the file's get_config returns for the variant."""
    module = load_module(path)
    with defects_of(path, f"get_config({variant!r})"):
        config = module.get_config(variant)
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"get_config of {path} returns {type(config).__name__}; it should return a ConfigDict"
        )
    accept_values_for_none(config)
    return config


@contextlib.contextmanager
def defects_of(path: Path, call: str) -> Iterator[None]:
    """One sentence where a function of a config file fails, which is a user's code."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{call} of {path} fails with {type(error).__name__}: {error}; --debug shows where"
        ) from error


def load_module(path: Path) -> types.ModuleType:
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file; a config file ends in .py")
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        what = "" if isinstance(error, SyntaxError) else f"{type(error).__name__}: "
        raise InputError(f"cannot read the config file {path}: {what}{error}") from error
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} has no get_config(arg); every config file defines one")
    return module


def accept_values_for_none(config: ConfigDict) -> None:
    """Lets a field that is None in the file be given any value; it would refuse all others."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            accept_values_for_none(value)
        elif value is None and config.get_type(key) is types.NoneType:
            with config.ignore_type():
                config[key] = placeholder(object)


def check_overrides(arguments: Sequence[str], config: ConfigDict) -> None:
    """Refuses `--config.path` that names no field, with the closest field that exists."""
    fields = {name: value for name, value in leaves(config) if not _is_class(name)}
    sections = {name.rpartition(".")[0] for name in fields}
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-")
        for prefix in ("config.", "noconfig."):
            name = flag.removeprefix(prefix)
            if name == flag or name in fields:
                continue
            if _is_class(name):
                raise InputError(f"config.{name} is what the section is; change it in the file")
            if name and name in sections:
                inner = [field for field in fields if field.startswith(f"{name}.")]
                raise InputError(f"config.{name} is a section; override {', '.join(inner)}")
            raise InputError(f"the config has no field {name!r}; {closest(name, fields)}")


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2] == CLASS


def take_none(arguments: list[str], config: ConfigDict) -> list[str]:
    """Removes every `--config.FIELD=none`, which empties the field; the fields' names.

    Words stay words: `--config.remat=none` names a policy. Fields of a dataclass are emptied, and
    whoever builds it refuses those that may not be; others only if the file leaves them empty.
    """
    fields, names = dict(leaves(config)), []
    for argument in list(arguments):
        flag, _, text = argument.partition("=")
        name = flag.lstrip("-").removeprefix("config.")
        if text.lower() != "none" or name not in fields or isinstance(fields[name], str):
            continue
        section, _, key = name.rpartition(".")
        section_config: Any = config[section] if section else config
        if fields[name] is not None and CLASS not in section_config:
            raise InputError(f"config.{name}={text}: it is {fields[name]!r} and cannot be none")
        arguments.remove(argument)
        with section_config.ignore_type():
            section_config[key] = None
        names.append(name)
    return names


def quote_words(argument: str, config: ConfigDict) -> str:
    """`--config.policies=full` with the quotes that a tuple of words needs to be read as one."""
    flag, equals, text = argument.partition("=")
    value = dict(leaves(config)).get(flag.lstrip("-").removeprefix("config."))
    if not equals or not isinstance(value, tuple) or not all(isinstance(x, str) for x in value):
        return argument
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return f"{flag}={text!r}"
    return argument


def check_items(overrides: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses a tuple whose items are of another type than the config file's."""
    for name, value in overrides.items():
        kinds = {type(item) for item in defaults[name]} if isinstance(value, tuple) else set()
        allowed = kinds | ({int} if float in kinds else set())
        for item in value if kinds else ():
            if type(item) not in allowed:
                names = " or ".join(sorted(kind.__name__ for kind in kinds))
                raise InputError(f"config.{name} holds {names}, not {item!r}")


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field, in the order of the config file."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_dict(value: Any) -> Any:
    if isinstance(value, FieldReference):
        value = value.get()
    if isinstance(value, ConfigDict):
        return {key: to_dict(value[key]) for key in value}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def show_help(experiment: str, path: Path, config: ConfigDict) -> None:
    described = header.read(path)
    print(f"{described.title}\n")
    for key, text in described.entries.items():
        print(f"{key:10} {text}")
    print(f"\nusage: {header.command(experiment)} [--config=FILE.py[:variant]]", end=" ")
    print("[--config.FIELD=VALUE ...] [--out=DIR] [--debug]\n")
    for name, value in leaves(config):
        print(f"  --config.{name}={value}")

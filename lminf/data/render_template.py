"""A program: renders a chat template in a process of its own, with limits of time and memory.

A template comes with a checkpoint and is a program: a loop within a loop runs for ever, and
`'a' * 10 ** 10` takes all memory, which no sandbox within a process can stop.

Standard input holds {"template": …, "variables": [{…}, …]}; standard output {"texts": […]}, a text
for each, or {"refused": why}. Imports nothing of lminf, so that it starts at once.
"""

import contextlib
import datetime
import functools
import json
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

SECONDS = 5  # of processor time
MEMORY_BYTES = 1 << 29
TEXT_CHARS = 1 << 26


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says for training; it prints its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration is a plain set)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that holds no underscored names: they are doors out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any):  # no self, so that a template may store that name
        for name in kwargs:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name}")


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    """The template in the environment that transformers renders it in, sandboxed and immutable."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(
        value: Any,
        indent: int | None = None,
        ensure_ascii: bool = False,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            indent=indent,
            ensure_ascii=ensure_ascii,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.filters["tojson"] = as_json
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def rendered(template: str, variables: dict[str, Any]) -> str:
    """The text, given up where it grows past TEXT_CHARS."""
    parts, size = [], 0
    for part in compiled(template).generate(variables):
        parts.append(part)
        size += len(part)
        if size > TEXT_CHARS:
            raise jinja2.TemplateError(f"it writes more than {TEXT_CHARS >> 20} MiB")
    return "".join(parts)


def limit() -> None:
    """Limits this process; systems without such limits are left to the caller's clock."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


def main() -> None:
    limit()
    request = json.loads(sys.stdin.buffer.read())
    try:
        answer: dict[str, Any] = {
            "texts": [rendered(request["template"], values) for values in request["variables"]]
        }
    except MemoryError:
        answer = {"refused": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template can raise whatever Python can
        answer = {"refused": str(error)[:500] or type(error).__name__}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()

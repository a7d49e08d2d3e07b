"""Conversations as their model reads them: a chat template's text, and which of it is control.

Special tokens that the template writes are control tokens; those that somebody wrote into a message
are not, or a message could begin a turn of the system. So messages are rendered in disguise: the
characters that special tokens begin and end with are exchanged for others that occur nowhere, and
what then still spells a special token comes from the template.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from lminf.data import render_template
from lminf.errors import InputError

SECONDS = 15.0  # by the clock, where the limit of processor time does not hold
SPARE = range(0xF0000, 0xFFFFE)  # characters of a private use area

Messages: TypeAlias = Sequence[Mapping[str, Any]]


def render(template: str, variables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The template's text for each set of variables, in a process that cannot run for ever."""
    try:
        request = json.dumps({"template": template, "variables": variables}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"these messages cannot be written as JSON ({error}); give texts, numbers, lists and "
            f"dictionaries"
        ) from error
    try:
        done = subprocess.run(
            [sys.executable, "-P", render_template.__file__],
            input=request, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _refusal(f"it ran for more than {SECONDS:.0f} s") from None
    except OSError as error:
        raise InputError(f"cannot start {sys.executable} for the chat template "
                         f"({error.strerror})") from error  # fmt: skip
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise _refusal(
            f"its process ended with status {done.returncode}; it may take "
            f"{render_template.SECONDS} s and {render_template.MEMORY_BYTES >> 20} MiB"
        ) from None
    if "refused" in answer:
        raise _refusal(answer["refused"])
    return answer["texts"]


def _refusal(why: str) -> InputError:
    return InputError(
        f"the chat template refused these messages: {why}; give a list of "
        f'{{"role": …, "content": …}} in the order that this model expects'
    )


def split(
    template: str, messages: Messages, controls: Sequence[str], variables: Mapping[str, Any]
) -> list[str]:
    """The conversation in pieces: plain text, special token, plain text, …, plain text.

    `controls` are the texts of the special tokens, `variables` what else the template may name.
    """
    if not isinstance(template, str):
        raise InputError(f"the chat template is a {type(template).__name__}, not a text; use a "
                         f"model whose files have one")  # fmt: skip
    taken = set(template)  # characters
    try:
        plain = _changed(messages, _noting(taken), _noting(taken))
    except RecursionError:
        raise _refusal("they are nested too deeply") from None
    if not controls:
        return render(template, [{**variables, "messages": plain}])
    spelled = re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))))
    edges = sorted({edge for control in controls for edge in (control[0], control[-1])})
    spare = (chr(code) for code in SPARE if chr(code) not in taken)
    disguise = str.maketrans(dict(zip(edges, spare, strict=False)))
    plainly = {hidden: chr(edge) for edge, hidden in disguise.items()}

    def lightly(text: str) -> str:
        return spelled.sub(lambda match: match[0].translate(disguise), text)

    def wholly(text: str) -> str:
        return text.translate(disguise)

    def pieces(text: str) -> list[str]:
        parts, start = [], 0
        for match in spelled.finditer(text):
            parts += [text[start : match.start()], match[0]]
            start = match.end()
        return [piece.translate(str.maketrans(plainly)) for piece in [*parts, text[start:]]]

    # Roles choose what a template does, and some write '<|' + role + '|>'.
    light, replaced = (
        pieces(text)
        for text in render(
            template,
            [
                {**variables, "messages": _changed(messages, lightly, lightly)},
                {**variables, "messages": _changed(messages, wholly, lightly)},
            ],
        )
    )
    if "".join(light) == "".join(replaced):
        return replaced
    # The template looks for such characters in messages, as for '</think>'.
    if light[1::2] == replaced[1::2]:
        return light
    raise _refusal("parts of a message form a special token together")


def _noting(taken: set[str]) -> Callable[[str], str]:
    """Leaves texts as they are, and adds their characters to `taken`."""

    def note(text: str) -> str:
        taken.update(text)
        return text

    return note


def _changed(value: Any, text: Callable[[str], str], role: Callable[[str], str]) -> Any:
    """The messages with each text in them changed."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {
            key: _changed(item, role if key == "role" else text, role)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_changed(item, text, role) for item in value]
    return value

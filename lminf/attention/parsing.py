"""Policies written on one line, and those in files of the user's own.

lm_infinite:window=4096,sinks=10                          a name of policies.POLICIES
per_layer:policies=(full,(lm_infinite:window=512,sinks=4))       a mix, repeated over the layers
my_module:Pulled:window=4096,sinks=10,pull=4              a class of my_module.py
"""

import inspect

from lminf import ranges
from lminf.attention.policy import NAMES, POLICIES, AnyPolicy, Named, Policy, head_policies
from lminf.config import import_choices, parse_choice
from lminf.errors import InputError


def parse_policy(policy: str | AnyPolicy) -> AnyPolicy:
    """The policy that a text describes, `name:field=value,…`, by a name of POLICIES or by
    `module:Class` in a file of the user's own; a policy is itself.

    It imports that module: it is for texts that somebody wrote for this run. What stands in
    fetched files is read with parse_choice, which knows POLICIES alone.
    """
    if isinstance(policy, Named):
        return _answering(policy)
    if not isinstance(policy, str):
        raise InputError(
            f"policy is {ranges.shown(policy)}; give a policy or its text, such as "
            f"'lm_infinite:window=4096,sinks=10'"
        )
    text, choices = import_choices(policy, POLICIES, base=Policy)
    try:
        return _answering(parse_choice(text, choices, what="policy"))
    except InputError:
        raise
    except Exception as error:
        if len(choices) == len(POLICIES):  # no code but ours ran
            raise
        raise InputError(
            f"{policy!r} cannot be built ({type(error).__name__}: {error}); mend its class"
        ) from error


def _answering(policy: AnyPolicy) -> AnyPolicy:
    """The policy, whose classes of the user's own have what is read of every policy."""
    for part in head_policies(policy):
        kind = type(part)
        if kind in NAMES:
            continue
        declared = (inspect.get_annotations(base) for base in kind.__mro__ if base is not object)
        for name in ("window", "num_sinks", *dict.fromkeys(n for names in declared for n in names)):
            try:
                value = getattr(part, name)
            except Exception as error:
                how = "a class attribute or a property"
                raise InputError(
                    f"the policy {kind.__module__}:{kind.__qualname__} has no {name}; give its "
                    f"class "
                    + (f"a field `sinks`, or `num_sinks` as {how}" if name == "num_sinks"
                       else f"`{name}` as a field, {how}")
                ) from error  # fmt: skip
            if name in ("window", "num_sinks") and not _is_count(value):
                raise InputError(
                    f"{name} of the policy {kind.__module__}:{kind.__qualname__} is "
                    f"{ranges.shown(value)}; give a whole number of at least 0, or None for all"
                )
    return policy


def _is_count(value: object) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (is_integer and ranges.Range(min=0).problem(value, whole=True) is None)

"""Where arrays live: two tables, and the function that joins them.

Beside the model, parameter path -> logical axes (`decoder.AXES`); here, by strategy, logical axis
-> mesh axis. A parameter whose path matches no rule of the first table, or two, is an error. Rules
of the second are tried in order: each gives a mesh axis to the first dimension that it divides, and
no array uses a mesh axis twice.

A strategy says which of weights, gradients and optimiser state (with the float32
master parameters) are sliced. That is all that ZeRO's stages differ in.
Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lminf.config import closest
from lminf.errors import InputError

AxisTable: TypeAlias = Mapping[str, tuple[str, ...]]  # path, a regular expression -> logical axes
Rules: TypeAlias = tuple[tuple[str, str], ...]  # (logical axis, mesh axis), the preferred first


@dataclass(frozen=True)
class Strategy:
    """Rules for what a step holds. Rows of a batch go over `data` and `fsdp` in all of them."""

    params: Rules = ()
    grads: Rules = ()
    opt: Rules = ()
    activations: Rules = (("batch", "data"), ("batch", "fsdp"))

    def __mul__(self, other: "Strategy") -> "Strategy":
        """Both at once."""
        return Strategy(
            *(
                tuple(dict.fromkeys(getattr(self, field.name) + getattr(other, field.name)))
                for field in fields(self)
            )
        )


# Any axis that divides will do; the width comes first, because every matrix has it. Layers are
# never sliced: the scan over them reads one at a time.
FSDP_RULES: Rules = tuple(
    (axis, "fsdp") for axis in ("embed", "mlp", "heads", "kv_heads", "vocab", "head_dim")
)
TENSOR_RULES: Rules = tuple((axis, "tensor") for axis in ("heads", "kv_heads", "mlp", "vocab"))
STRATEGIES: dict[str, Strategy] = {
    "data": Strategy(),
    "zero1": Strategy(opt=FSDP_RULES),
    "zero2": Strategy(opt=FSDP_RULES, grads=FSDP_RULES),
    "zero3": Strategy(opt=FSDP_RULES, grads=FSDP_RULES, params=FSDP_RULES),
    "tensor": Strategy(
        params=TENSOR_RULES,
        grads=TENSOR_RULES,
        opt=TENSOR_RULES,
        # Between products, where norms and residuals work row by row, positions are sliced
        # instead. Source: Korthikanti et al. 2022, arXiv:2205.05198.
        activations=(*Strategy.activations, *TENSOR_RULES, ("residual_length", "tensor")),
    ),
    "context": Strategy(
        activations=(
            *Strategy.activations,
            ("length", "context"),
            ("residual_length", "context"),
        )
    ),
}
EXPERT_RULES = (("expert", "expert"),)
# Outside of the experts their devices hold other rows, as `data` would have it.
STRATEGIES["expert"] = Strategy(
    EXPERT_RULES,
    EXPERT_RULES,
    EXPERT_RULES,
    (*Strategy.activations, ("batch", "expert"), *EXPERT_RULES),
)
STRATEGIES["fsdp"] = STRATEGIES["zero3"]
# What lminf.parallel.pipeline adds to a strategy. Where the stages do not divide the vocabulary,
# its rows are divided along the width while they are at rest.
_STAGE_RULES = (("layers", "stage"), ("vocab", "stage"), ("embed", "stage"))
PIPELINE = Strategy(_STAGE_RULES, _STAGE_RULES, _STAGE_RULES)


def parse(text: str) -> Strategy:
    """The strategy `name`, or the product `name+name`."""
    product = Strategy()
    for name in text.split("+"):
        if name.strip() not in STRATEGIES:
            raise InputError(
                f"no strategy is called {name!r}; {closest(name.strip(), STRATEGIES)}, or a "
                f"product such as zero3+tensor"
            )
        product = product * STRATEGIES[name.strip()]
    return product


def check(strategy: Strategy, mesh: Mesh) -> None:
    """Refuses a mesh axis over which nothing would be divided: its devices would do the same."""
    used = {
        axis
        for rules in (strategy.params, strategy.grads, strategy.opt, strategy.activations)
        for _, axis in rules
    }
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            known = axis in STRATEGIES
            instead = f"add it, as in zero3+{axis}" if known else "use mesh.data for its devices"
            instead = "give a pipeline, such as 1f1b" if axis == "stage" else instead
            raise InputError(
                f"mesh.{axis}={size} but the strategy divides nothing over {axis}; {instead}, or "
                f"set mesh.{axis}=1"
            )


def path_of(key_path: Sequence[Any]) -> str:
    """`layers/attention/wq` for the path of a leaf."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in key_path
    )


def logical_axes(path: str, table: AxisTable) -> tuple[str, ...]:
    """The logical axes of the parameter at `path`."""
    matches = [axes for rule, axes in table.items() if re.fullmatch(rule, path)]
    if len(matches) != 1:
        raise InputError(
            f"the parameter {path} matches {len(matches)} of the rules that name its axes; "
            f"give it exactly one in the table of its model (decoder.AXES)"
        )
    return matches[0]


def spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """The PartitionSpec of an array of this shape."""
    sliced: list[tuple[str, ...]] = [()] * len(shape)
    used: set[str] = set()
    for logical, axis in rules:
        if axis in used or logical not in axes or mesh.shape[axis] == 1:
            continue
        dimension = axes.index(logical)
        pieces = math.prod(mesh.shape[name] for name in (*sliced[dimension], axis))
        if shape[dimension] % pieces == 0:
            sliced[dimension] += (axis,)
            used.add(axis)
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in sliced))


def shardings(params: Any, table: AxisTable, rules: Rules, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a tree of parameters."""

    def one(key_path, leaf):
        path = path_of(key_path)
        axes = logical_axes(path, table)
        if len(axes) != leaf.ndim:
            raise InputError(f"{path} has shape {leaf.shape}, but its axes are {axes}")
        return NamedSharding(mesh, spec(axes, leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(one, params)


def optimizer_shardings(state: Any, params: Any, laid_out: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of an optimiser's state: that of the parameter it is about.

    `0/mu/layers/attention/wq` lies as `layers/attention/wq` does, if it has its shape. What has
    another (counts, Adafactor's rows and columns) is small, and whole on every device.
    """
    known = {
        path_of(key_path): (leaf.shape, sharding)
        for (key_path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(laid_out), strict=True
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(key_path, leaf):
        parts = path_of(key_path).split("/")
        tails = ("/".join(parts[start:]) for start in range(len(parts)))
        shape, sharding = next((known[tail] for tail in tails if tail in known), (None, replicated))
        return sharding if leaf.shape == shape else replicated

    return jax.tree_util.tree_map_with_path(one, state)


def device_bytes(tree: Any) -> int:
    """The most bytes that one device of this process holds of these arrays."""
    bytes_on: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            bytes_on[shard.device] = bytes_on.get(shard.device, 0) + shard.data.nbytes
    return max(bytes_on.values(), default=0)


def planned_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes on each device of arrays of these shapes, laid out so; the devices may be absent."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


@dataclass(frozen=True)
class Constrain:
    """`constrain(x, *logical axes)` of a decoder: x, sharded as the strategy says."""

    mesh: Mesh
    strategy: Strategy

    def __call__(self, x, *axes: str | None):
        where = spec(axes, x.shape, self.strategy.activations, self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, where))

"""Legend of the axis letters, and the array types that every module writes its shapes in.

B  batch                 T  query positions (tokens)     S  key positions or cache slots
N  query heads           K  key/value heads              G  query heads per key head, N / K
H  channels of one head  D  model width                  F  hidden width of the MLP
V  vocabulary            L  layers                       E  experts
P  rotated channel pairs C  tokens in one chunk

Units, where a name or docstring gives none: positions and lengths are in tokens, losses in
nats per token, sizes in bytes, work in FLOPs (one multiply-add is two).
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int

Params: TypeAlias = Mapping[str, Any]  # nested dictionary of arrays; layers stacked on axis 0
Tokens: TypeAlias = Int[Array, "B T"]
Positions: TypeAlias = Int[Array, "B T"]
Hidden: TypeAlias = Float[Array, "B T D"]
Logits: TypeAlias = Float[Array, "... V"]
Queries: TypeAlias = Float[Array, "B T N H"]
Keys: TypeAlias = Float[Array, "B S K H"]
Mask: TypeAlias = Bool[Array, "B T S"]
Key: TypeAlias = jax.Array  # a typed PRNG key

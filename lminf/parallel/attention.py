"""Attention of hidden states that lie on a mesh: each device attends for its rows and heads.

Kernels are opaque to the compiler's partitioner, so they run inside a shard_map.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from lminf.attention import attend, rope
from lminf.attention.policy import LayerPolicy, PerHead
from lminf.attention.scores import ScoreConfig
from lminf.parallel import partition
from lminf.parallel.partition import Strategy


@dataclass(frozen=True)
class Sharded:
    """Takes the place of `attend.prefill` in a decoder whose arrays lie on a mesh."""

    mesh: Mesh
    strategy: Strategy

    def __call__(
        self,
        policy: LayerPolicy,
        config: ScoreConfig,
        positions: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        context_axis: str | None = None,
        implementation: str | None = None,
    ) -> attend.Prefill:
        """`read(q, k, v)`: each device for the queries it holds."""
        assert context_axis is None, "this is what enters shard_map, and names the axis itself"
        rules = self.strategy.activations
        rows = partition.spec(("batch", "length"), positions.shape, rules, self.mesh)
        # Slopes and mixes count all heads, so those stay together.
        together = isinstance(policy, PerHead) or isinstance(config.encoding, rope.Alibi)

        def read(q, k, v, **options):
            key_heads = partition.spec(("kv_heads",), k.shape[2:3], rules, self.mesh)[0]
            across = None if together else key_heads
            heads = PartitionSpec(*rows, across)

            def local(q, k, v, positions, segments, options):
                return attend.prefill(
                    policy, config, positions, segments=segments, context_axis=rows[1],
                    implementation=implementation,
                )(q, k, v, **options)  # fmt: skip

            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(heads, heads, heads, rows, rows, PartitionSpec()),
                out_specs=heads,
                check_vma=False,  # kernels' loops start from constants, which it would refuse
            )(q, k, v, positions, segments, options)

        return read

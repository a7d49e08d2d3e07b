"""Where a config comes from, and that timing candidates yields a table that can be kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf import kernels
from lminf.kernels.common import bench, config, tuning
from lminf.kernels.common.config import Key
from lminf.kernels.cross_entropy import api, xla_chunked
from lminf.kernels.cross_entropy.xla_chunked import Config

KEY = Key("linear_cross_entropy", "float32", 1, 1, 8, 32, 64, 64, 0)
OTHER = Config(block_rows=16, block_vocab=32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def loss(embeddings, classifier, config=None):
    return kernels.linear_cross_entropy(
        embeddings, classifier, jnp.arange(32), config=config, implementation="xla_chunked"
    )


@pytest.fixture
def used(monkeypatch):
    """The configs that reached the implementation."""
    seen = []

    def spy(rules, operands, labels, config):
        seen.append(config)
        return xla_chunked.losses(rules, operands, labels, config)

    monkeypatch.setitem(api.IMPLEMENTATIONS, "xla_chunked", spy)
    return seen


def test_explicit_then_overlay_then_shipped_then_heuristic(used, monkeypatch):
    """Each place is asked only when those before it have nothing."""
    shipped, outer, inner = (tuning.Table() for _ in range(3))
    shipped.put(KEY, "xla_chunked", Config(1, 1))
    outer.put(KEY, "xla_chunked", Config(2, 2))
    inner.put(KEY, "xla_chunked", Config(3, 3))
    given = normal(0, 32, 8), normal(1, 64, 8)

    def trace(config=None):
        jax.eval_shape(lambda e, c: loss(e, c, config), *given)

    trace()
    monkeypatch.setattr(tuning, "shipped", lambda name: shipped)
    trace()
    with outer:
        trace()
        with tuning.overlay(inner):
            trace()
            trace(OTHER)
        trace()
    trace()
    assert used == [None, *(Config(n, n) for n in (1, 2, 3)), OTHER, Config(2, 2), Config(1, 1)]


def test_a_table_survives_its_file(tmp_path):
    table = tuning.Table()
    table.put(KEY, "xla_chunked", OTHER)
    table.dump(tmp_path / "table.json")
    assert tuning.load(tmp_path / "table.json").find(KEY, "xla_chunked") == OTHER


def test_keys_share_buckets_of_lengths():
    near = Key("lambda_attention", "float32", 8, 2, 64, 1025, 2000, 4096, 64)
    same = Key("lambda_attention", "float32", 8, 2, 64, 2048, 2000, 9999, 64)
    assert str(near) == str(same)
    assert str(near) != str(Key("lambda_attention", "float32", 8, 2, 64, 1024, 2000, 4096, 64))


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="block_columns"):
        config.from_json("linear_cross_entropy", "xla_chunked", {"block_columns": 3})


def test_shipped_tables_name_only_what_exists():
    """Every entry of every shipped table still makes a config."""
    for path in tuning.TUNED.glob("*.json"):
        for key, entry in tuning.load(path).entries.items():
            for implementation, fields in entry.items():
                config.from_json(key.split()[0], implementation, fields)


def test_autotune_keeps_the_fastest_config(monkeypatch):
    """The timings are given, so that what is tested is the search: 8 rows are the best."""

    def medians(fn, args, best, key, implementation, candidates, repeats):
        return {c: 10.0 if c is None else 1 + abs(c.block_rows - 8) / 999 for c in candidates}

    monkeypatch.setattr(tuning, "_medians", medians)
    table = tuning.autotune(loss, normal(0, 32, 8), normal(1, 64, 8), rounds=9)
    assert table.find(KEY, "xla_chunked") == Config(block_rows=8)


@pytest.mark.slow
def test_autotune_returns_a_table_that_changes_the_call(used):
    given = normal(0, 256, 8), normal(1, 512, 8)

    def total(embeddings, classifier):
        return kernels.linear_cross_entropy(
            embeddings, classifier, jnp.arange(256), implementation="xla_chunked"
        )

    table = tuning.autotune(total, *given, repeats=2, rounds=1)
    tried = set(used)
    assert {None, Config(), Config(512, 1024), Config(1024, 512)} <= tried
    for entry in table.entries.values():
        with table:
            jax.eval_shape(lambda *a: total(*a), *given)
        assert config.to_json(used[-1]) == entry["xla_chunked"]


def test_programs_are_timed_in_turns():
    calls = []
    programs = {name: lambda repeat, name=name: calls.append((name, repeat)) for name in "ab"}
    found = bench.interleaved(programs, repeats=2, warmup=1)
    assert calls == [(name, repeat) for repeat in (-1, 0, 1) for name in "ab"]
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    timing = bench.summary([0.004, 0.002, 0.003], calls=2)
    assert (timing.median_ms, timing.min_ms, timing.repeats) == (1.5, 1.0, 3)

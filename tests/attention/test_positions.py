"""Angles, schedules and slopes against exact arithmetic; positions past 10^8."""

import dataclasses
import math
from decimal import Decimal, getcontext

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf.attention import attend, cache, rope, scores
from lminf.attention.policies.eviction import H2O
from lminf.attention.policy import (
    Full,
    Lambda,
    LeakyReRoPE,
    LMInfinite,
    PerHead,
    ReRoPE,
    SelfExtend,
    Streaming,
    Window,
)
from lminf.config import parse_choice
from lminf.errors import InputError
from tests.attention import cases, oracle

LAST = 2**31 - 1
TURN = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")

# --- Angles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "dim"), [(10_000, 8), (500_000, 16)])
def test_angles_are_right_at_every_position(base, dim):
    getcontext().prec = 60
    positions = [0, 1, 1000, 2**24 + 1, 10**8, 10**8 + 12_345, LAST, -1, -12_345]
    encoding = rope.Rotary(float(base), dim, "half")
    found = cases.compiled(lambda at: rope.rotation(encoding, at))(jnp.asarray([positions]))
    cos, sin = map(np.asarray, found)
    for i, position in enumerate(positions):
        for m in range(dim // 2):
            angle = float(position * Decimal(base) ** (Decimal(-2 * m) / dim) % TURN)
            # 3e-7 of the reduction; and past 10^9, that a frequency is one float64 (1e-16 * 2^31).
            assert cos[0, i, m] == pytest.approx(math.cos(angle), abs=5e-7)
            assert sin[0, i, m] == pytest.approx(math.sin(angle), abs=5e-7)


@pytest.mark.parametrize("scaling", [rope.Unscaled(), rope.YaRN(4.0, 64), rope.DynamicNTK(2.0, 64)])
def test_rotations_are_looked_up_as_they_are_computed(scaling):
    encoding = rope.Rotary(10_000.0, 8, "half", scaling)
    read = jnp.array([[5000], [60_000]], jnp.int32)  # a schedule of each row's own length
    config = scores.ScoreConfig(encoding, 1.0, None)
    positions = jnp.array([[0, 1, 255, 256, 257, 4999], [3, 511, 512, 30_000, 59_999, 65_535]])

    def both(read, positions):
        placement = scores.Placement(config, read, table=2**16)
        assert placement.table is not None
        return placement.table.at(positions), placement.rotation(positions)

    for found, computed in zip(*cases.compiled(both)(read, positions), strict=True):
        np.testing.assert_allclose(found, computed, atol=1e-6, rtol=0)


@settings(max_examples=20)
@given(
    positions=st.lists(st.integers(-(2**31), LAST), min_size=64, max_size=64),
    fraction=st.integers(0, 2**64 - 1),
)
def test_the_reduction_to_one_turn_is_exact_integer_arithmetic(positions, fraction):
    high, low = (np.array([[word]], np.uint32) for word in (fraction >> 32, fraction & 0xFFFFFFFF))
    angle = cases.compiled(rope._angle)(np.array(positions, np.int32)[:, None], high, low)[:, 0]
    exact = np.array([float((p * fraction) % 2**64) for p in positions]) * 2.0**-64
    error = np.asarray(angle, np.float64) / (2 * np.pi) - exact
    assert np.abs(error - np.round(error)).max() < 3e-7 / (2 * np.pi)


def test_a_rotation_turns_each_pair_of_channels_by_its_angle():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 6)).astype(np.float32)
    positions, theta = np.array([[0, 5, 900]]), np.array([1.0, 0.01])
    for layout, pairs in (("half", [(0, 2), (1, 3)]), ("interleaved", [(0, 1), (2, 3)])):
        encoding = rope.Rotary(10_000.0, 4, layout)

        @cases.compiled
        def run(x, at, encoding=encoding):
            return rope.rotate(x, rope.rotation(encoding, at), encoding.layout)

        found = run(x, jnp.asarray(positions))
        expected = x.astype(np.complex128)
        for (a, b), frequency in zip(pairs, theta, strict=True):
            turn = np.exp(1j * positions * frequency)[..., None]
            turned = (x[..., a] + 1j * x[..., b]) * turn
            expected[..., a], expected[..., b] = turned.real, turned.imag
        np.testing.assert_allclose(found, expected.real, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(found)[..., 4:], x[..., 4:])


# --- Schedules ------------------------------------------------------------------------------------

BASE, DIM, TRAINED = 10_000.0, 64, 2048
PLAIN = np.array([BASE ** (-2 * m / DIM) for m in range(DIM // 2)])


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(rope.Linear(4.0).frequencies(BASE, DIM), PLAIN / 4, rtol=1e-14)


def test_ntk_slows_the_slowest_channel_by_alpha_and_keeps_the_fastest():
    ratio = rope.NTKAware(8.0).frequencies(BASE, DIM) / PLAIN
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 8, rel=1e-12)
    assert (np.diff(ratio) < 0).all()


@pytest.mark.parametrize("length", [1, TRAINED, TRAINED + 1, 5 * TRAINED])
def test_dynamic_ntk_is_ntk_of_the_current_length(length):
    scaling = rope.DynamicNTK(alpha=2.0, trained_length=TRAINED)
    alpha = max(2.0 * length / TRAINED - 1, 1)
    run = cases.compiled(lambda length: scaling.frequencies_at(BASE, DIM, length))
    found = run(jnp.array([[length], [1]]))
    assert found.shape == (2, 1, DIM // 2)
    expected = rope.NTKAware(alpha).frequencies(BASE, DIM)
    np.testing.assert_allclose(found[0, 0], expected, rtol=3e-6)
    np.testing.assert_allclose(found[1, 0], PLAIN, rtol=3e-6)


def test_longrope_divides_each_frequency_and_warms_by_the_stretch():
    scaling = rope.LongRoPE((1.0, 2.0), (4.0, 8.0), TRAINED, 16.0)
    np.testing.assert_array_equal(
        scaling.frequencies(BASE, 4, scaling.long_factor), [1 / 4, BASE**-0.5 / 8]
    )
    assert scaling.temperature == pytest.approx(math.sqrt(1 + math.log(16, TRAINED)))
    text = f"longrope:short_factor=(1,2),long_factor=(4,8),trained_length={TRAINED},factor=16"
    assert parse_choice(text, rope.SCALINGS) == scaling
    with pytest.raises(ValueError, match="LongRoPE needs length="):
        rope.rotation(rope.Rotary(BASE, 4, "half", scaling), jnp.zeros((1, 2), jnp.int32))


def test_yarn_keeps_fast_channels_and_slows_the_others():
    """NTK-by-parts: a channel's turns within the trained length decide, on a ramp between."""
    scaling = rope.YaRN(8.0, TRAINED)
    ratio = scaling.frequencies(BASE, DIM) / PLAIN
    at = {b: DIM * math.log(TRAINED / (2 * math.pi * b)) / (2 * math.log(BASE)) for b in (32, 1)}
    low, high = math.floor(at[32]), math.ceil(at[1])
    assert 0 < low < high < DIM // 2
    for m in range(DIM // 2):
        keep = 1 - min(max((m - low) / (high - low), 0), 1)
        assert ratio[m] == pytest.approx((1 - keep) / 8 + keep, rel=1e-12)
    assert scaling.temperature == pytest.approx(0.1 * math.log(8) + 1)
    assert rope.YaRN(8.0, TRAINED, attention_factor=1.5).temperature == 1.5
    # Where every channel turns less than once, YaRN is interpolation with a temperature.
    slow = rope.YaRN(8.0, 4).frequencies(BASE, DIM)
    np.testing.assert_allclose(slow[1:], PLAIN[1:] / 8, rtol=1e-12)


def test_llama3_scales_by_wavelength():
    scaling = rope.Llama3(8.0, low_freq_factor=1.0, high_freq_factor=4.0, trained_length=TRAINED)
    for theta, found in zip(PLAIN, scaling.frequencies(BASE, DIM), strict=True):
        wavelength = 2 * math.pi / theta
        if wavelength < TRAINED / 4:
            expected = theta
        elif wavelength > TRAINED:
            expected = theta / 8
        else:
            smooth = (TRAINED / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * theta / 8 + smooth * theta
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 32, 40])
@pytest.mark.parametrize("max_bias", [8.0, 4.0])
def test_alibi_slopes_are_the_published_geometric_sequence(heads, max_bias):
    expected = [oracle.alibi_slope(head, heads, max_bias) for head in range(heads)]
    np.testing.assert_allclose(rope.Alibi(max_bias).slopes(heads), expected, rtol=1e-6)
    if heads == 8 and max_bias == 8.0:
        assert expected == [2.0**-n for n in range(1, 9)]


# --- Places far away ------------------------------------------------------------------------------

SHIFTED = [
    (Full(), "rotary"),
    (Window(5), "alibi"),
    (ReRoPE(5), "partial"),
    (LeakyReRoPE(5, 4), "rotary"),
    (SelfExtend(5, 4), "yarn"),  # by a multiple of the group
]


def test_only_differences_of_positions_count():
    q, k, v = cases.arrays(1)
    at = cases.padded((0, 0))

    @cases.compiled
    def run(q, k, v, at):
        return [cases.reference(p, cases.scoring(e), at)(q, k, v) for p, e in SHIFTED]

    near, far = run(q, k, v, at), run(q, k, v, at + np.int32(10**8))
    for (policy, _), a, b in zip(SHIFTED, near, far, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0, err_msg=policy.name)


BOUNDED = [
    (LMInfinite(5, 3), "rotary", 1),
    (LMInfinite(6, 2, distance=4), "alibi", 3),
    (PerHead((Streaming(7, 2), Window(4))), "partial", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "encoding", "group"), BOUNDED)
def test_a_stream_reads_the_same_after_100_million_tokens(policy, encoding, group):
    """A chunk and a token, with the same sinks and window, at the start and far on."""
    scoring, layout = cases.scoring(encoding), cache.layout_for(policy, 10**9)
    first = layout.slots
    text = [x[:1, : first + 7] for x in cases.arrays(group)]

    @cases.compiled
    def run(offset, q, k, v):
        # A cache that has read `offset` tokens: the first ones, and the last before the offset.
        last = offset - layout.window + jnp.arange(layout.window)
        at = jnp.concatenate([jnp.arange(layout.sinks), last])[None].astype(jnp.int32)
        shape = cache.CacheShape(1, 10**9, q.shape[2], *k.shape[2:], k.dtype)
        empty = cache.create(policy, shape, layers=1)
        slots = layout.destinations(at)
        held = cache.KVState(*(cache.write(empty.k, x[:, :first], 0, slots) for x in (k, v)))
        pos, outs = cache.write_pos(empty.pos, at, slots), []
        for start, stop in ((0, 6), (6, 7)):
            at = offset + jnp.arange(start, stop, dtype=jnp.int32)[None]
            step, pos = attend.extend(policy, scoring, layout, pos, at)
            new = [x[:, first + start : first + stop] for x in (q, k, v)]
            out, held = step(*new, held, 0)
            outs.append(out)
        return jnp.concatenate(outs, 1)

    start = np.asarray(run(np.int32(first), *text))
    for offset in (10**8, 10**8 + 3, LAST - 20):
        np.testing.assert_allclose(run(np.int32(offset), *text), start, atol=1e-5, rtol=0)
    # At the start nothing is forgotten, so the cache holds the whole text.
    at = np.arange(first + 7)[None]
    whole = oracle.attention(policy, scoring, *text, q_pos=at, k_pos=at)
    np.testing.assert_allclose(start, whole[:, first:], atol=cases.ATOL, rtol=0)


# --- Queries that grow ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(5, 3),
        pytest.param(Full(), marks=pytest.mark.slow),
        pytest.param(H2O(32, recent=6, turn=24), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_models_gain_of_queries_is_theirs_at_once_and_in_steps(policy):
    """Llama 4: 1 + beta ln(1 + floor(position / length))."""
    q, k, v = map(jnp.asarray, cases.arrays(1))
    at = cases.padded((0, 9))
    gain = 1 + 0.5 * np.log(1 + np.floor(np.maximum(at, 0) / 7.0))
    plain = cases.scoring("rotary")
    growing = dataclasses.replace(plain, query_gain=rope.QueryGain(0.5, 7))
    grown = q * gain[..., None, None].astype(np.float32)
    sizes = (8, 8) + (1,) * 8

    def both(config):
        def run(q):
            steps = cases.chunks(policy, config, at, sizes, implementation=None)
            return attend.prefill(policy, config, jnp.asarray(at))(q, k, v), steps(q, k, v)[0]

        return cases.compiled(run)

    as_it_is = both(plain)
    for found, expected in zip(both(growing)(q), as_it_is(grown), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert abs(as_it_is(q)[0] - as_it_is(grown)[0]).max() > 1e-2


# --- Dynamic scaling ------------------------------------------------------------------------------

DYNAMIC = scores.ScoreConfig(
    rope.Rotary(100.0, 8, "half", rope.DynamicNTK(2.0, 10)), cases.WIDTH**-0.5, None
)


LONG = rope.LongRoPE((1.0,) * 4, (2.5,) * 4, 16, 2.0, attention_factor=1.0)


@pytest.mark.parametrize(
    ("scaling", "static"),
    [
        (rope.DynamicNTK(2.0, 10), lambda length: rope.NTKAware(2.0 * length / 10 - 1)),
        (LONG, lambda length: rope.Linear(2.5) if length > 16 else rope.Unscaled()),
    ],
)
def test_scaling_by_length_follows_each_row_on_its_own(scaling, static):
    q, k, v = cases.arrays(1)
    config = scores.ScoreConfig(rope.Rotary(100.0, 8, "half", scaling), cases.WIDTH**-0.5, None)
    at = cases.padded((0, 9))

    @cases.compiled
    def run(q, k, v, at):
        policy = LMInfinite(5, 3)
        return (
            cases.reference(Full(), config, at)(q, k, v),
            attend.prefill(policy, config, at)(q, k, v),
            cases.reference(policy, config, at)(q, k, v),
        )

    full, whole, reference = run(q, k, v, at)
    np.testing.assert_allclose(whole, reference, atol=cases.ATOL, rtol=0)
    for row, length in ((0, 24), (1, 15)):
        encoding = rope.Rotary(100.0, 8, "half", static(length))
        alone = [x[row : row + 1, 24 - length :] for x in (q, k, v)]
        place = np.arange(length)[None]
        expected = oracle.attention(
            Full(), scores.ScoreConfig(encoding, cases.WIDTH**-0.5, None), *alone,
            q_pos=place, k_pos=place,
        )  # fmt: skip
        np.testing.assert_allclose(full[row, 24 - length :], expected[0], atol=1e-5, rtol=0)


def test_dynamic_scaling_of_packed_rows_is_refused():
    at = jnp.asarray(cases.padded((0, 0)))
    with pytest.raises(InputError, match="packed rows hold texts of several lengths"):
        attend.prefill(Lambda(5, 3), DYNAMIC, at, segments=jnp.zeros_like(at))

"""Published values out of published constants; no data file is needed."""

import numpy as np
import pytest

from lminf.scaling import accounting, baselines, fertility, losses, published
from tests.scaling import expected


@pytest.mark.parametrize("number", ["1", "2", "4", "5"])
def test_constants_give_the_published_values(number):
    rows = [row for row in expected.constants() if row["check"] == number]
    assert rows
    assert [row for row in rows if not row["ok"]] == []


def measured_pairs():
    """(V, tokens per character) of the 24 published pairs."""
    pairs = np.array(fertility.MEASURED.constants).reshape(24, 2)
    assert pairs[0] == pytest.approx((1024, 0.09915 / 0.22326))
    return pairs.T


def test_fertility_power_law_fits_all_pairs_within_one_and_a_half_percent():
    sizes, measured = measured_pairs()
    fitted = fertility.POWERLAW.tokens_per_character(sizes)
    assert np.abs(fitted / measured - 1).max() < 0.0155


def test_least_squares_on_the_pairs_is_not_the_published_parabola():
    sizes, measured = measured_pairs()
    fit = np.polyfit(np.log(sizes), measured, 2)
    np.testing.assert_allclose(fit, (0.00692627, -0.16992197, 1.26979104), rtol=2e-6)


def test_fertility_survives_json():
    for instance in fertility.INSTANCES.values():
        assert fertility.from_json(instance.to_json()) == instance


def test_step_law_examples():
    for n, d, lr, batch in (
        (1e9, 1e11, 1.63e-3, 1.11e6),
        (7e9, 1.4e12, 9.17e-4, 5.0e6),
        (7e10, 1.4e12, 1.78e-4, 5.0e6),
    ):
        found = published.STEP.setting(n=n, d=d)
        assert found.lr == pytest.approx(lr, rel=5e-3)
        assert found.batch == pytest.approx(batch, rel=5e-3)
        assert baselines.rule("step").setting(baselines.Query(n, d, None, None)) == pytest.approx(
            found
        )


def test_off_optimum_vocabularies_of_approach_3():
    law = published.LOSS_REFERENCE
    best = law.optimum(n_nv=302e6).flops
    for factor, size in ((0.2, 10.2e3), (0.5, 13.1e3), (1, 15.8e3), (2, 19.0e3), (5, 24.5e3)):
        assert law.optimum(n_nv=302e6, flops=factor * best).vocab_size == pytest.approx(
            size, rel=5e-3
        )
    for flops, size in ((2.8e20, 23.9e3), (1.2e21, 35.4e3), (2.3e21, 42.2e3)):
        assert law.optimum(n_nv=2.87e9, flops=flops).vocab_size == pytest.approx(size, rel=5e-3)


def test_the_three_routes_at_70b():
    sizes = [
        law.optimum(n_nv=70e9).vocab_size
        for law in (published.LOSS_REFERENCE, published.LOSS_CONSISTENT, published.LOSS_TOKENS)
    ]
    np.testing.assert_allclose(sizes, (218e3, 60e3, 66e3), rtol=0.015)


def test_tokens_and_flops_name_the_same_optimum():
    for law in published.VOCAB_LAWS.values():
        by_flops = law.optimum(n_nv=7e9, flops=2e22)
        by_tokens = law.optimum(n_nv=7e9, tokens=by_flops.tokens)
        assert by_tokens.vocab_size == pytest.approx(by_flops.vocab_size, rel=1e-6)


def test_published_laws_have_intervals_and_warn_outside_their_range():
    law = published.ISOFLOP
    low, high, method = law.interval(n_nv=7e9)
    assert low < law.optimum(n_nv=7e9).vocab_size < high
    assert method
    assert any("extrapolation" in note for note in law.optimum(n_nv=7e9).warnings)
    assert not any("extrapolation" in note for note in law.optimum(n_nv=3e8).warnings)


def test_counts_of_the_sweep():
    shapes = [accounting.block_parameters(*shape) for shape in accounting.SWEEP_SHAPES.values()]
    expected = (33.55e6, 84.93e6, 150.99e6, 301.99e6, 631.11e6, 1130.4e6, 2870.5e6)
    np.testing.assert_allclose(shapes, expected, rtol=3e-4)


def test_unigram_loss_is_zero_for_a_unigram_model():
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, 40)
    log_probs = losses.log_unigram(counts)
    targets = random.integers(0, 40, 500)
    assert losses.unigram_normalised(-log_probs[targets], targets, log_probs) == pytest.approx(
        0, abs=1e-12
    )
    assert losses.bits_per_character(np.log(2.0), 0.25) == pytest.approx(0.25)


def test_chinchilla_exponents():
    k = published.HOFFMANN.constants
    assert k["beta"] / (k["alpha"] + k["beta"]) == pytest.approx(0.46, abs=5e-3)
    assert published.HOFFMANN.optimum(flops=5.76e23).loss == pytest.approx(1.9150, abs=2e-4)
    assert published.REFIT.optimum(flops=5.76e23).loss == pytest.approx(1.9744, abs=2e-4)

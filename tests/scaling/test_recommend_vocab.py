"""One vocabulary, or "not determined": against the independent refit, and against an oracle."""

import dataclasses

import numpy as np
import pytest
from scipy import optimize

from lminf import cli, scaling
from lminf.errors import InputError
from lminf.scaling import fertility, published, recommend_vocab, vocab
from lminf.scaling.vocab_isoflop import IsoflopFit
from tests.scaling import data


@pytest.fixture(name="refits", scope="module")
def _refits():
    return recommend_vocab.published_refits()


@pytest.mark.parametrize(("n_nv", "independent"), [(3e9, 28e3), (7e9, 43e3), (13e9, 53e3)])
def test_compute_optimal_models_to_13b_are_determined(refits, n_nv, independent):
    found = recommend_vocab.recommend(refits, n_nv=n_nv)
    assert found.determined
    assert found.vocab_size == pytest.approx(independent, rel=0.15)
    low, high = found.interval
    assert low < found.flat[0] < found.vocab_size < found.flat[1] < high
    assert f"Take V = {-(-found.vocab_size // 128) * 128:,.0f}" in found.sentences()[0]


@pytest.mark.parametrize(
    ("n_nv", "tokens", "reaches"),
    [(70e9, None, (32e3, 458e3)), (8e9, 15e12, (51e3, 300e3)), (70e9, 15e12, (51e3, 500e3))],
)
def test_large_models_and_15t_tokens_are_not(refits, n_nv, tokens, reaches):
    """At 70B the FLOPs limit alone takes the best compromise from 32K to 458K."""
    found = recommend_vocab.recommend(refits, n_nv=n_nv, tokens=tokens)
    assert not found.determined
    low, high = found.interval
    assert low < 1.1 * reaches[0]
    assert high > reaches[1]
    sentence = found.sentences()[0]
    assert sentence.startswith("Not determined")
    assert "Llama-3-" in sentence
    if tokens is None:
        limits = next(r for r in found.ranges if r.choice == "FLOPs limit")
        np.testing.assert_allclose(limits[1:], reaches, rtol=0.05)
    else:
        assert found.flops == pytest.approx(
            6 * (n_nv + found.vocab_size * found.width) * tokens, rel=1e-3
        )


def plain_loss(law, n_nv, width, size, flops):
    """L_u in the formula of the specification."""
    k, n_v = law.constants, size * width
    tokens = flops / (6 * (n_nv + n_v))
    if law.mode == "consistent-reference":
        f = fertility.PUBLISHED.tokens_per_character
        tokens *= float(f(size / 1000) / f(size))
    return (
        np.exp(k["ln_A1"]) * (n_nv / 1e6) ** -k["beta"]
        + np.exp(k["ln_A2"]) * (n_v / 1e6) ** -k["alpha2"]
        + np.exp(k["ln_B"]) * (tokens / 1e9) ** -k["beta"]
        - np.exp(k["ln_E"])
    )


def plain_waste(law, n_nv, width, size, flops):
    """1 - F'/F, where the best V at F' is as good as `size` at F: two nested searches."""

    def best(budget):
        return optimize.minimize_scalar(
            lambda x: plain_loss(law, n_nv, width, np.exp(x), budget),
            bounds=(np.log(1e3), np.log(1e6)), method="bounded", options={"xatol": 1e-8},
        ).fun  # fmt: skip

    reached = plain_loss(law, n_nv, width, size, flops)
    share = optimize.brentq(lambda s: best(s * flops) - reached, 0.02, 1.0001)
    return 1 - share


def test_the_waste_is_that_of_the_definition(refits):
    query = {"n_nv": 7e9, "width": 4096.0, "flops": 7e21}
    for law in refits.all_rows:
        for size in (16_384, 131_072):
            found = law.flops_lost(size, **query)
            assert found == pytest.approx(plain_waste(law, size=size, **query), abs=1e-3)
    found = recommend_vocab.recommend(refits, n_nv=7e9, flops=7e21)
    worst = [max(plain_waste(law, size=f * found.vocab_size, **query) for law in refits.all_rows)
             for f in (0.95, 1.0, 1.05)]  # fmt: skip
    assert worst[1] == min(worst)
    assert found.waste_by_laws == pytest.approx(worst[1], abs=1e-3)


def test_a_wider_choice_makes_a_vocabulary_undetermined(refits):
    """The rule follows from the fits: the same query, with an 8B model's optimum moved."""
    shifted = {9e99: [dataclasses.replace(law, constants={**law.constants, "ln_A2": 2.0})
                      for law in refits.all_rows]}  # fmt: skip
    other = dataclasses.replace(refits, limits=shifted)
    assert not recommend_vocab.recommend(other, n_nv=3e9).determined
    none = [dataclasses.replace(law, constants={**law.constants, "ln_A2": -19.0})
            for law in refits.all_rows]  # fmt: skip
    with pytest.raises(InputError, match="no loss-optimal vocabulary"):
        recommend_vocab.recommend(dataclasses.replace(refits, all_rows=none), n_nv=3e9)


def test_draws_without_an_optimum_are_counted_and_are_no_number():
    for law in (published.LOSS_TOKENS, published.LOSS_REFERENCE, published.LOSS_CONSISTENT):
        for n_nv in (3e9, 70e9):
            span = law.interval(n_nv=n_nv)
            sizes = np.array([span.low, span.high])
            inside = (sizes > vocab.SMALLEST_VOCAB) & (sizes < vocab.LARGEST_VOCAB)
            assert np.all(inside | np.isinf(sizes))
            assert ("have no optimum" in span.method) or inside.all()
    span = published.LOSS_TOKENS.interval(n_nv=3e9)
    assert span.low == -np.inf
    assert "of 100 draws have no optimum: in" in span.method


@pytest.mark.parametrize("n_nv", [3e9, 7e9, 13e9, 70e9])
def test_the_published_envelope_lies_in_the_middle_of_its_draws(n_nv):
    law = published.ISOFLOP
    width, n_v, _ = law._solve(law.constant_draws(), n_nv=n_nv)
    assert 0.3 < np.mean(n_v / width < law.optimum(n_nv=n_nv).vocab_size) < 0.7


def test_approach_2_has_a_spread_and_no_sampling_distribution():
    assert "no sampling distribution" in published.DERIVATIVE.interval(n_nv=7e9).method


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "reaches"),
    [(data.vocab_table, (36e3, 589e3)), (data.whole_vocab_table, (46e3, 397e3))],
)
def test_the_interval_of_approach_1_holds_its_point_in_the_middle(table, reaches):
    """With interpolation between the resampled curves the lower end was 6,000 for every size."""
    law = scaling.fit(IsoflopFit(), table(), draws=300)
    np.testing.assert_allclose(law.interval(n_nv=70e9)[:2], reaches, rtol=0.2)
    _, n_v, _ = law._solve(law.constant_draws(), n_nv=70e9)
    share = np.mean(n_v / 8192 < law.optimum(n_nv=70e9).vocab_size)
    assert 0.25 < share < 0.75


def test_the_commands_end_in_the_recommendation(capsys):
    for words, first in (
        (["vocab", "--n", "3B"], "Take V = 27,904"),
        (["vocab", "--n", "8B", "--tokens", "15T"], "Not determined: these runs leave"),
        (["step", "--n", "1B", "--tokens", "100B"], "Take a peak learning rate of 0.0016"),
    ):
        cli.main(["scaling", "predict", *words])
        shown = " ".join(capsys.readouterr().out.split())
        assert first in shown
        assert "-inf" not in shown

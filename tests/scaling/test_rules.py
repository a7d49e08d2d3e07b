"""Rules of other studies, and the recommended learning rate, batch and weight decay."""

import math

import numpy as np
import pytest

from lminf.errors import InputError
from lminf.scaling import (
    baselines,
    fertility,
    hyperparameters,
    practice,
    published,
    recommend_step,
    regret,
    tokenization,
)
from tests.scaling import data


def test_weight_decay_keeps_the_timescale_of_least_loss():
    """tau = 1.084 (D/N)^-0.527: at 20 tokens per parameter 0.2236."""
    decay = hyperparameters.weight_decay(lr=1e-3, batch=1e6, n=1e9, d=2e10)
    timescale = 1e6 / (1e-3 * decay * 2e10)
    assert timescale == pytest.approx(1.084 * math.exp(-0.527 * math.log(20)))
    assert timescale == pytest.approx(0.2236, abs=1e-4)
    twice = hyperparameters.weight_decay(lr=1e-3, batch=2e6, n=1e9, d=2e10)
    assert twice == pytest.approx(2 * decay)  # optimal decay is linear in the batch


def test_batches_of_power_lines_depend_on_tokens_alone():
    for rule, exponent in (
        (hyperparameters.optimal_batch, 0.383),
        (hyperparameters.critical_batch, 0.462),
    ):
        assert rule(d=2e11) / rule(d=1e11) == pytest.approx(2**exponent)


@pytest.mark.parametrize("n", [85e6, 302e6, 1.2e9])
def test_the_two_critical_batches_of_one_paper_agree_at_20_tokens_per_parameter(n):
    by_parameters = 512 * 93.20 * (n / 1e6) ** 0.47
    assert hyperparameters.critical_batch_adam(d=20 * n) == pytest.approx(by_parameters, rel=0.01)


def test_rates_of_wsd_fall_with_tokens_where_the_step_law_rises():
    low, high = (hyperparameters.wsd_lr(n=1e9, d=d) for d in (1e10, 1e11))
    assert high / low == pytest.approx(10**-0.351)
    step = [published.STEP.setting(n=1e9, d=d).lr for d in (1e10, 1e11)]
    assert step[1] > step[0]
    assert hyperparameters.scaled_lr(1e-3, batch_factor=2) == pytest.approx(1e-3 * 2**0.5)


@pytest.mark.parametrize("vocab_size", [4096, 32_768, 131_072])
def test_bytes_per_parameter_do_not_depend_on_the_tokenizer(vocab_size):
    bytes_per_token = float(1 / fertility.PUBLISHED.tokens_per_character(vocab_size))  # of ASCII
    found = tokenization.allocate(flops=1e21, bytes_per_token=bytes_per_token)
    assert 6 * found.n * found.d == pytest.approx(1e21)
    assert found.d * bytes_per_token / found.n == pytest.approx(60)
    assert found.data_bytes == pytest.approx(60 * found.n)


def test_the_loss_is_linear_in_the_logarithm_of_the_input_vocabulary():
    points = {"small": (1e5, 2.8), "large": (1.28e7, 2.7)}
    sizes = 1e5 * 128 ** np.array([0, 0.5, 1.0, 1.5])
    losses = [tokenization.input_vocabulary_loss(size, **points) for size in sizes]
    np.testing.assert_allclose(losses, (2.8, 2.75, 2.7, 2.65))
    with pytest.raises(InputError, match="measure two sizes"):
        tokenization.input_vocabulary_loss(1e6, small=(1e5, 2.8), large=(1e5, 2.7))


def test_one_rate_batch_and_decay_inside_the_fitted_range():
    found = recommend_step.recommend(n=1e9, d=1e11)
    assert found.outside == ()
    assert found.lr == pytest.approx(1.63e-3, rel=5e-3)
    assert found.batch == pytest.approx(1.11e6, rel=5e-3)
    tau = found.batch / (found.lr * found.weight_decay * 1e11)
    assert tau == pytest.approx(1.084 * 100**-0.527)
    for side in found.lr_plateau:  # what the ends of the plateau cost by the law's own bowl
        cost = published.STEP.excess(lr_factor=side / found.lr, batch_factor=1)
        assert cost == pytest.approx(recommend_step.PLATEAU)
    assert "Outside" not in " ".join(found.sentences(2048))


def test_outside_the_fitted_range_the_interval_is_not_tight():
    """--n 135e6 --d 2e12 printed the interval of the constants alone."""
    found = recommend_step.recommend(n=135e6, d=2e12)
    tight = published.STEP.interval(n=135e6, d=2e12)["lr"]
    assert "extrapolated" in tight.method
    assert found.lr_interval[1] / found.lr_interval[0] >= 2 ** (4 * 0.70)
    assert found.lr_interval[1] / found.lr_interval[0] > 2 * tight.high / tight.low
    assert any("d=2e+12 is 20 times above" in sentence for sentence in found.outside)
    assert "Outside the range" in found.sentences(2048)[1]


def test_the_replication_is_that_of_the_file():
    columns = data.columns(
        data.SHARED / "step_replication" / "optima.csv", ("N", "D", "batch_tokens", "lr")
    )
    n, d = columns["N"], columns["D"]
    for name, (lr, batch) in practice.REPLICATION.items():
        rule = baselines.rule(name)
        settings = [rule.setting(baselines.Query(*at, None, None)) for at in zip(n, d, strict=True)]
        off = np.log2([s.lr for s in settings] / columns["lr"])
        assert np.sqrt(np.mean(off**2)) == pytest.approx(lr, abs=6e-3)
        if np.isfinite(batch):
            off = np.log2([s.batch for s in settings] / columns["batch_tokens"])
            assert np.sqrt(np.mean(off**2)) == pytest.approx(batch, abs=6e-3)


@pytest.mark.slow
def test_one_setting_for_every_model_beats_all_rivals_of_the_step_law():
    """All 17 groups; the independent values are 1.16 (0.90 to 1.43), 1.17 unseen and 2.84."""
    table = data.whole_dense_table()
    rules = [baselines.rule(name) for name in ("step", "fixed", "microsoft", "porian", "deepseek")]
    found = regret.regrets(table, rules)
    means = {name: regret.mean_regret(groups, "linear")[0] for name, groups in found.items()}
    assert means["step"] == pytest.approx(1.16, rel=0.06)
    assert means["fixed"] == pytest.approx(2.84, rel=0.03)
    assert min(means[name] for name in ("microsoft", "porian", "deepseek")) > means["fixed"]
    np.testing.assert_allclose(regret.interval(found["step"], "linear"), (0.90, 1.43), rtol=0.07)

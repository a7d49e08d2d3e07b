"""Plans under a model: packed rows are separate documents, and a run trains on a store."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lminf.attention import policy as policies
from lminf.data import store, tokenizing
from lminf.data.loader import Loader
from lminf.data.plans import BestFit
from lminf.data.tokenizers import ByteTokenizer
from lminf.models import decoder, layer_policies
from lminf.objectives import cross_entropy
from tests.models import specs


@jax.jit
def nll(params, tokens, targets, positions, segments):
    """Nats of every target, [B, T]."""
    by_layer = layer_policies.by_layer(policies.LMInfinite(window=8, sinks=2),
                                 windows=specs.LLAMA.windows,
                                 num_kv_heads=specs.LLAMA.num_kv_heads)  # fmt: skip
    module = decoder.Decoder(specs.LLAMA, by_layer)
    hidden, _ = module.apply({"params": params}, tokens, positions=positions, segments=segments)
    return cross_entropy.token_nll(specs.LLAMA, params, hidden, targets)


@pytest.mark.slow
def test_packed_rows_are_separate_documents():
    """The loss of a token does not depend on what else stands in its row."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, n) for n in (5, 20, 33, 9, 12, 3, 26)]
    loaded = Loader([store.from_documents(documents)], BestFit(), length=32, rows=2, seed=0)
    params = specs.parameters(specs.LLAMA)
    found = 0
    for step in range(int(np.ceil(loaded.schedule.steps))):
        batch = loaded.batch(step)
        names = ("tokens", "targets", "positions", "segments")
        packed = nll(params, *(jnp.asarray(batch[name]) for name in names))
        for row in range(2):
            for segment in np.unique(batch["segments"][row][batch["weights"][row] == 1]):
                at = batch["segments"][row] == segment
                alone = np.zeros((2, 2, 32), np.int32)  # of one shape, so compiled once
                alone[:, 0, : at.sum()] = batch["tokens"][row][at], batch["targets"][row][at]
                positions = jnp.tile(jnp.arange(32), (2, 1))
                apart = nll(params, *map(jnp.asarray, alone), positions, jnp.ones_like(positions))
                expected = apart[0, : at.sum()]
                np.testing.assert_allclose(packed[row][at], expected, atol=2e-5)
                found += 1
    assert found >= len(documents)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["decomposition:shortest=3", "mixture:weights=(2,1),plan=best_fit"]
)
def test_train_lm_trains_on_stores_by_a_plan(tmp_path, plan):
    words = [f"{i} is a number, {i + 1} is the next. " * (1 + i % 30) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    paths = [str(tmp_path / name) for name in ("s", "t")][: 1 + plan.startswith("mixture")]
    for path in paths:
        tokenizing.tokenize([str(tmp_path / "a.jsonl")], ByteTokenizer(), path, name="bytes")
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "experiments.train_lm", "--config=train_lm:tiny",
        "--config.model.width=32", "--config.model.num_layers=2", "--config.model.hidden_dim=48",
        "--config.data.batch=8", "--config.data.length=32", "--config.evaluate.batches=1",
        "--config.evaluate.sample=0", "--config.steps=20", "--config.evaluate.every=20",
        f"--config.data.plan={plan}", f"--config.data.path={','.join(paths)}", f"--out={out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    (loss,) = [row["loss"] for row in rows if row["part"] == "loss"]
    assert loss < 4.5  # ln 257 = 5.55 nats before

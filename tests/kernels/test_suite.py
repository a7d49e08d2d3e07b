"""The one-command suite: its counts, its protocol, its exit status, and a tiny run of it."""

import json
import sys

import jax
import numpy as np
import pytest

from lminf.kernels import checks, peers, programs, suite
from lminf.kernels.programs import Work
from lminf.kernels.suite import Plan

SMALL = {"B": 1, "T": 96, "N": 4, "K": 2, "H": 16, "w": 24, "g": 4}
TINY = Plan(
    dtype="float32",
    work=(
        Work("lambda_attention", SMALL, True, ("xla_chunked", "triton")),
        Work("lambda_decode", SMALL, False, ("xla",)),
        Work("linear_cross_entropy", {"N": 32, "D": 16, "V": 96}, True, ("xla_chunked",)),
        Work("block_sparse_attention", SMALL | {"block": 16, "listed": 3}, True, ("xla_chunked",)),
    ),
    check_dtypes=("float32",),
    seeds=(0,),
    repeats=2,
    budget_s=1.0,
    gemm_size=64,
    copy_megabytes=1,
)


def test_pairs_are_those_of_the_mask():
    for length, window, num_global in ((37, 5, 3), (37, 5, 40), (9, 20, 2), (12, 1, 0)):
        apart = np.arange(length)[:, None] - np.arange(length)
        near = (apart >= 0) & (apart < window)
        far = (apart >= window) & (np.arange(length) < num_global)
        found = programs.pairs(length, window=window, num_global=num_global)
        assert found == near.sum() + far.sum()
    assert programs.pairs(131072, window=4096, num_global=100) == 541_177_002


def test_costs_of_the_loss_are_four_products():
    work = Work("linear_cross_entropy", {"N": 8192, "D": 2304, "V": 256000}, True, ())
    flops, _ = programs.costs(work, 2)
    assert flops == pytest.approx(4 * 2 * 8192 * 2304 * 256000)


def test_every_platform_has_a_plan():
    for platform in ("cpu", "gpu", "tpu"):
        for quick in (True, False):
            planned = suite.plan(platform, quick=quick)
            assert {work.op for work in planned.work} >= {
                "lambda_attention",
                "lambda_decode",
                "linear_cross_entropy",
            }


def test_a_python_without_torch_says_so(tmp_path):
    """The peers' process has nothing to offer; the suite goes on without it."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$2"\n')
    program.chmod(0o755)
    process = peers.Peers(str(program))
    assert process.versions == {"absent": "torch"}
    process.close()


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, 1)])
def test_exit_status_says_whether_all_checks_passed(monkeypatch, tmp_path, ok, status):
    monkeypatch.setattr(suite, "run", lambda planned, peers: {"checks": [{"ok": ok}]})
    assert suite.main(["--out", str(tmp_path / "results.json")]) == status


def test_a_wrong_result_fails_its_check():
    """An implementation off by a thousandth, or with one NaN, does not pass."""
    right = np.random.default_rng(0).standard_normal(50)
    nan = right.copy()
    nan[7] = np.nan
    for wrong in (right * 1.001, nan):
        [error] = checks._errors({"out": wrong}, {"out": right}).values()
        row = {"dtype": "float32", "err": error, "naive_err": 1e-7}
        assert not checks._passes(row, "out")
    [error] = checks._errors({"out": right}, {"out": right}).values()
    assert checks._passes({"dtype": "float32", "err": error, "naive_err": 1e-7}, "out")


@pytest.mark.slow
def test_a_tiny_run_fills_the_schema():
    lines = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = suite.run(TINY, None, lines.append)
    results = json.loads(json.dumps(results))
    assert set(results) == {
        "schema", "commit", "date", "device", "versions", "ceilings", "checks", "timings",
        "ratios", "absent",
    }  # fmt: skip
    assert all(row["ok"] for row in results["checks"])
    assert {row["op"] for row in results["checks"]} == {work.op for work in TINY.work}
    assert [row["impl"] for row in results["timings"]] == [
        "xla_chunked", "xla", "xla_chunked", "xla_chunked",
    ]  # fmt: skip
    for row in results["timings"]:
        assert set(row) == {
            "op", "impl", "case", "pass", "median_ms", "min_ms", "iqr_ms", "repeats", "tflops",
            "floor_ms", "of_floor", "peak_mem_mb", "config",
        }  # fmt: skip
        assert 0 < row["min_ms"] <= row["median_ms"]
    configs = [row["config"] for row in results["timings"]]
    assert configs[0] == {"block_q": 128, "block_k": 256, "edge_k": 128}
    assert configs[1] == configs[3] == {}  # nothing to choose
    assert configs[2]["block_rows"] == 1024
    assert any("triton: not timed" in line for line in lines)
    assert "torch" in results["absent"]

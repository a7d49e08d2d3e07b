"""Published and recomputed values beside those that the code gives, as rows.

Numbers refer to section 10 of the specification. Estimates (7, 8, 9) are of the 5 families and 14
groups of tests.scaling.data.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lminf import scaling
from lminf.scaling import accounting, baselines, diagnostics, published, regret
from lminf.scaling import fertility as fertilities
from lminf.scaling.steps import StepFit
from lminf.scaling.tables import StepTable, VocabTable
from lminf.scaling.vocab_derivative import DerivativeFit, flops_root
from lminf.scaling.vocab_isoflop import IsoflopFit
from lminf.scaling.vocab_loss import LossFit

Row = dict[str, Any]


def row(number: str, what: str, value: float, expected: float, tolerance: float) -> Row:
    good = bool(abs(value - expected) <= tolerance)
    return {
        "check": number, "what": what, "value": float(value), "expected": float(expected),
        "tolerance": float(tolerance), "ok": good,
    }  # fmt: skip


# N_nv: V of approaches 1, 2, 3 as printed (whole entries, cut off)
PUBLISHED_VOCAB = {
    33e6: (5755, 6144, 4662),
    85e6: (8436, 9029, 7032),
    151e6: (13612, 14592, 11549),
    302e6: (18183, 19528, 15759),
    631e6: (22391, 24094, 19853),
    1.13e9: (27280, 29401, 24631),
    2.87e9: (37942, 40993, 35272),
    3e9: (39368, 42538, 36648),
    7e9: (62281, 67450, 59548),
    13e9: (83429, 90503, 81347),
    30e9: (141711, 154071, 141899),
    70e9: (211860, 230861, 217961),
    130e9: (236501, 258138, 248188),
    300e9: (355894, 389324, 383659),
}
FERTILITY = {
    256: 0.5245, 4096: 0.3318, 16384: 0.2723, 32768: 0.2518, 65536: 0.2374, 131072: 0.2292,
    200000: 0.2272,
}  # fmt: skip
ROOTS = (10322, 15939, 24593, 32776, 40941, 49416, 65928)


def constants() -> Iterator[Row]:
    """Checks 1, 2, 4, 5 that need no file."""
    for size, expected in FERTILITY.items():
        value = float(fertilities.PUBLISHED.tokens_per_character(size))
        yield row("1", f"f({size})", value, expected, 5.1e-5)
    laws = (published.ISOFLOP, published.DERIVATIVE, published.LOSS_REFERENCE)
    for n_nv, sizes in PUBLISHED_VOCAB.items():
        for approach, (law, expected) in enumerate(zip(laws, sizes, strict=True), start=1):
            value = law.optimum(n_nv=n_nv).vocab_size
            yield row("2", f"V of approach {approach} at {n_nv:.3g}", value, expected, 2.0)
    procedure = DerivativeFit()
    for n_nv, root, expected in zip(
        procedure.sizes, procedure.roots(fertilities.PUBLISHED), ROOTS, strict=True
    ):
        yield row("2", f"root of approach 2 at {n_nv:.3g}", root, expected, 1.0)
    gamma = procedure.gamma(fertilities.PUBLISHED)
    yield row("2", "gamma of approach 2", gamma, 0.8354, 1e-4)
    yield from _minima()
    for law, flops, n, ratio in (
        (published.HOFFMANN, 5.76e23, 4.03e10, 59),
        (published.REFIT, 5.76e23, 7.23e10, 18.4),
        (published.HOFFMANN, 1e21, 2.215e9, 34.0),
        (published.REFIT, 1e21, 2.778e9, 21.6),
    ):
        found = law.optimum(flops=flops)
        yield row("5", f"{law.version} N at {flops:g}", found.n, n, 2e-3 * n)
        yield row("5", f"{law.version} D/N at {flops:g}", found.d / found.n, ratio, 5e-3 * ratio)
        grid = found.n * np.exp(np.linspace(-0.01, 0.01, 201))
        lowest = grid[np.argmin(law.loss(n=grid, d=flops / 6 / grid))]
        yield row("5", f"{law.version} minimum at {flops:g}", lowest / found.n, 1, 1.01e-4)


def _minima() -> Iterator[Row]:
    """Roots of approaches 2 and 3 are minima of what they minimise."""
    n_nv, width = 7e9, 4096.0
    size = flops_root(n_nv, width=width, fertility=fertilities.PUBLISHED)[0]
    grid = size * np.exp(np.linspace(-0.01, 0.01, 201))
    cost = (n_nv + grid * width) * fertilities.PUBLISHED.tokens_per_character(grid)
    yield row("4", "approach 2 minimises FLOPs", grid[cost.argmin()] / size, 1, 1.01e-4)
    for law in (published.LOSS_REFERENCE, published.LOSS_CONSISTENT, published.LOSS_TOKENS):
        found = law.optimum(n_nv=n_nv)
        grid = found.vocab_size * np.exp(np.linspace(-0.01, 0.01, 201))
        loss = law.loss_at_budget(n_nv=n_nv, vocab_size=grid, width=width, flops=found.flops)
        lowest = grid[np.argmin(loss)] / found.vocab_size
        yield row("4", f"{law.version} is a minimum", lowest, 1, 2.01e-4)


def vocab_file(table: VocabTable) -> Iterator[Row]:
    """Checks 1, 7 and 8 on a vocabulary sweep."""
    f = fertilities.PUBLISHED
    identity = 6 * (table.n_nv + table.n_v) * table.characters
    worst = np.abs(identity * f.tokens_per_character(table.vocab_size) / table.flops - 1).max()
    yield row("1", "FLOPs identity, worst row", worst, 0, 1e-6)
    for densify, kept, huber, ols in (
        ("published", 112, (0.1167, 0.4285), (0.2840, 0.4088)),
        ("none", 99, (0.0530, 0.4469), (0.1062, 0.4315)),
    ):
        for selector, (k, alpha) in (("huber", huber), ("ols", ols)):
            law = scaling.fit(IsoflopFit(selector, densify), table, draws=0)
            name = f"approach 1, {densify}, {selector}:"
            k_nv = float(np.exp(law.constants["ln_k_nv"]))
            points = law.diagnostics["points_kept"]
            exponent = law.constants["alpha_nv"]
            yield row("7", f"{name} points kept", points, kept, 0)
            yield row("7", f"{name} exponent of N_v", exponent, alpha, 2e-3)
            yield row("7", f"{name} k of N_v", k_nv, k, 1.5e-3)
            if (densify, selector) == ("published", "huber"):
                k_nnv, k_h = (float(np.exp(law.constants[f"ln_k_{n}"])) for n in ("nnv", "h"))
                yield row("7", f"{name} k of N_nv", k_nnv, 0.0834, 5e-4)
                yield row("7", f"{name} k of H", k_h, 6.41, 0.02)
    free = scaling.fit(IsoflopFit(exponents="free"), table, draws=0).constants
    yield row("7", "free exponent of N_nv", free["alpha_nnv"], 0.4505, 2e-3)
    yield row("7", "free exponent of H", free["alpha_h"], 0.5871, 2e-3)
    for mode, expected in (
        ("reference", (2.44, 0.21, 2.10, 5.25, 0.583)),
        ("tokens", (2.51, 0.06, 1.13, 5.26, 0.570)),
    ):
        law = scaling.fit(LossFit(mode), table, draws=0)
        names = ("ln_A1", "ln_A2", "ln_B", "ln_E", "beta")
        for name, value in zip(names, expected, strict=True):
            found = law.constants[name]
            found = found if name == "beta" else float(np.exp(found))
            tolerance = 1e-3 if name == "beta" else 6e-3
            yield row("8", f"approach 3 {mode}: {name}", found, value, tolerance)
        on_bound = float("alpha2" in law.diagnostics["on_bound"])
        yield row("8", f"approach 3 {mode}: alpha2 on its bound", on_bound, 1, 0)
    wide = scaling.fit(LossFit("tokens", bounds="wide"), table, draws=0)
    said = float(any("not identified" in warning for warning in wide.warnings))
    yield row("8", "approach 3 tokens, no bounds: says not identified", said, 1, 0)
    top = [
        diagnostics.isoflop_curve(table, n, diagnostics.common_budget(table, n), "L_u").optimum
        for n in np.unique(table.n_nv)
    ]
    for n_nv, found, about in zip(
        np.unique(table.n_nv), top, (5e3, 16e3, 14e3, 25e3, 27e3), strict=False
    ):
        name = f"IsoFLOP optimum of L_u at {n_nv:.3g}, over the spec's"
        yield row("2.10", name, found / about, 1, 0.25)


STEP_REGRETS = {
    "step": (1.21, 0.83, 0.79),
    "deepseek": (8.32, 7.71, 8.21),
    "deepseek-md": (8.76, 8.60, 8.66),
    "porian": (7.82, 8.61, 7.33),
    "microsoft": (5.75, None, None),
    "openai-lr": (9.12, None, None),
    "openai": (52.1, None, None),
    "moonlight": (10.4, None, None),
    "step-best-batch": (0.72, None, None),
}


def step_file(table: StepTable) -> Iterator[Row]:
    """Check 9 on a dense learning rate x batch file."""
    for threshold, kept, lr, batch in (
        (0.001, 34, None, None),
        (0.0025, 100, (74.2, -0.8198, 0.2441), (0.3417, 0.5916)),
        (0.005, 205, (46.2, -0.7652, 0.2126), (5.08, 0.4778)),
    ):
        law = scaling.fit(StepFit(threshold=threshold), table, draws=0)
        name = f"step law, {100 * threshold:g} %:"
        yield row("9", f"{name} rows kept", law.diagnostics["kept"], kept, 0)
        if lr is None or batch is None:
            continue
        k = law.constants
        lr_k, batch_k = float(np.exp(k["lr_ln_k"])), float(np.exp(k["batch_ln_k"]))
        yield row("9", f"{name} lr constant", lr_k, lr[0], 1e-3 * lr[0])
        yield row("9", f"{name} lr, exponent of N", k["lr_n"], lr[1], 1e-4)
        yield row("9", f"{name} lr, exponent of D", k["lr_d"], lr[2], 1e-4)
        yield row("9", f"{name} batch constant", batch_k, batch[0], 1e-3 * batch[0])
        yield row("9", f"{name} batch, exponent", k["batch_d"], batch[1], 1e-4)
    # 8,000 draws: the mean over 1,000 still scatters by 0.002 itself.
    mean = scaling.fit(StepFit(), table, draws=8000).diagnostics["row_mean"]
    for name, expected in (("lr_n", -0.820), ("lr_d", 0.243), ("batch_d", 0.591)):
        yield row("9", f"row-bootstrap mean {name}", mean[name], expected, 2e-3)
    rules = [baselines.rule(name) for name in STEP_REGRETS if name in baselines.RULES]
    rules.append(baselines.without_batch(baselines.rule("step")))
    yield from regrets(table, rules, STEP_REGRETS, "total")


def moe_file(table: StepTable) -> Iterator[Row]:
    """Check 9 on the mixture-of-experts file."""
    rules = [baselines.rule("step")]
    yield from regrets(table, rules, {"step": (1.67, 1.59, 0.93)}, "total")
    yield from regrets(table, rules, {"step": (10.4, None, None)}, "active")


def regrets(table, rules, expected, use_n) -> Iterator[Row]:
    for name, groups in regret.regrets(table, rules, use_n=use_n).items():
        for method, value in zip(regret.METHODS, expected[name], strict=True):
            if value is not None:
                mean, _ = regret.mean_regret(groups, method)
                what = f"mean regret of {name} ({use_n} N), {method}, per mille"
                yield row("9", what, mean, value, 0.02 * value)


STEP_BOOTSTRAP = {
    "lr_intercept": 0.586308, "lr_coefN": -0.712922, "lr_coefD": 0.307491,
    "bs_intercept": -0.543542, "bs_coefD": 0.570944,
}  # fmt: skip


def bootstrap_file(columns: dict[str, np.ndarray]) -> Iterator[Row]:
    """Check 3: means of the released bootstrap rows."""
    for name, expected in STEP_BOOTSTRAP.items():
        yield row("3", f"mean {name}", float(np.mean(columns[name])), expected, 1e-6)


DENSE_SHAPE_COLUMNS = ("N", "numl", "h", "ffnh")
MOE_SHAPE_COLUMNS = (
    "N", "Na", "M", "numl", "h", "ffnh", "numld", "nume", "topk", "moeh", "sed", "seq_len",
)  # fmt: skip


def dense_shapes(columns: dict[str, np.ndarray]) -> Row:
    """Check 1: N of every dense row from its shapes."""
    n, layers, width, hidden = (columns[name] for name in DENSE_SHAPE_COLUMNS)
    worst = np.abs(accounting.block_parameters(layers, width, hidden) / n - 1).max()
    return row("1", "N from shapes, worst dense row", worst, 0, 1e-6)


def moe_parameters(columns: dict[str, np.ndarray], experts: str) -> np.ndarray:
    """Non-embedding parameters, the router ignored; `experts` names the column of their number."""
    layers, width, dense = (columns[name] for name in ("numl", "h", "numld"))
    sparse = columns[experts] * columns["moeh"] + columns["sed"]
    mlp = dense * columns["ffnh"] + (layers - dense) * sparse
    return layers * 4 * width**2 + 3 * width * mlp


def moe_shapes(columns: dict[str, np.ndarray]) -> Iterator[Row]:
    """Check 1: N, N_a and M of every mixture-of-experts row."""
    for name, experts in (("N", "nume"), ("Na", "topk")):
        worst = np.abs(moe_parameters(columns, experts) / columns[name] - 1).max()
        yield row("1", f"{name} from shapes, worst MoE row", worst, 0, 1e-6)
    flops = accounting.flops_per_token(
        columns["Na"], layers=columns["numl"], width=columns["h"], seq_len=columns["seq_len"]
    )
    yield row("1", "M, worst MoE row", np.abs(flops / columns["M"] - 1).max(), 0, 1e-6)

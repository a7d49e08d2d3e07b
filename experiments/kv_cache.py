"""Quality against cache bytes, and the cost of a token against the length of the stream, by policy.

Quality is that of one policy at one capacity: the NLL of a continuation after a prompt, and the
share of passkeys retrieved. Bytes are those of the arrays after the prompt, a policy's state
included. The cost of a token is measured on caches of zeros (`_streams`).
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from lminf.attention.parsing import parse_policy
from lminf.attention.policies.prompt_compression import SnapKV, ThinK
from lminf.attention.policy import AnyPolicy
from lminf.data import sources
from lminf.errors import InputError
from lminf.evals import score
from lminf.evals.passkey import Passkey
from lminf.evals.runner import Cell, Subject
from lminf.experiments import _evals, _models
from lminf.experiments._main import main
from lminf.experiments._streams import Stream, step_times
from lminf.lm.lm import LM
from lminf.run import plots, tables
from lminf.run.folder import Row, RunFolder
from lminf.run.progress import Progress


def run(c: ConfigDict, out: RunFolder) -> Iterator[Row]:
    policies = list(choices(c))
    lm = _models.load(c.model, seed=c.seed)
    models = [(family, lm.with_policy(policy)) for family, policy in policies]
    yield from losses(c, out, models)
    subjects = [retrieval(c, family, model) for family, model in models]
    cell = Cell(Passkey(), c.passkey_length, c.passkeys)
    for row in _evals.measure(c, out, lm, subjects, [cell]):
        yield {"measured": "passkey", **row}
    done = {(row["measured"], row["policy"], row.get("position")) for row in out.rows()}
    timed = [
        (model, position)
        for model in dict(models).values()  # of each family the largest
        for position in c.positions
        if model.policy.bounded or position <= c.unbounded_to
    ]
    if done.issuperset(("cost", model.policy.name, position) for model, position in timed):
        return
    out.keep(lambda row: row["measured"] != "cost")  # timed in turns, so all in one call
    streams = [Stream(model, position, room=c.steps + 1) for model, position in timed]
    times = step_times(streams, c.steps)
    for stream, (low, median, high) in zip(streams, times, strict=True):
        yield {
            "measured": "cost",
            "model": c.model,
            "policy": stream.lm.policy.name,
            "position": stream.position,
            "ms_per_token": median,
            "low": low,
            "high": high,
            **_evals.bytes_after(stream.lm, stream.position),
            "steps": c.steps,
        }


def choices(c: ConfigDict) -> Iterator[tuple[str, AnyPolicy]]:
    """(family, policy) of every cell: a text with places for a capacity is one for each."""
    for text in c.policies:
        for capacity in c.capacities if "{" in text else c.capacities[:1]:
            try:
                filled = text.format(c=capacity, w=capacity - 4, h=capacity // 4)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise InputError(
                    f"{text!r} cannot be filled in ({type(error).__name__}: {error}); its places "
                    f"are {{c}}, {{w}} and {{h}}"
                ) from error
            policy = parse_policy(filled)
            family = text.partition(":")[0]
            if isinstance(policy, ThinK):  # each ratio and combination is a curve
                family += f" {policy.ratio}" + (" on snapkv" if policy.capacity else "")
            if isinstance(policy, SnapKV):
                family += f" asked by {policy.window}"
            yield family, policy


def losses(c: ConfigDict, out: RunFolder, models: Sequence[tuple[str, LM]]) -> Iterator[Row]:
    """The loss of a continuation after a prompt, by policy and capacity."""
    done = {row["policy"] for row in out.rows() if row["measured"] == "loss"}
    text = sources.text_of(None)
    tokens = c.prompt + c.continuation
    missing = [(family, lm) for family, lm in models if lm.policy.name not in done]
    with Progress(len(missing) * tokens, label="losses", unit="tokens") as progress:
        for count, (family, lm) in enumerate(missing, 1):
            started = time.perf_counter()
            nll = lm.nll(text, length=tokens, prompt=c.prompt).token_nll[c.prompt - 1 :]
            yield {
                "measured": "loss",
                "model": c.model,
                "family": family,
                "policy": lm.policy.name,
                "text_digest": sources.digest(text),
                "prompt": c.prompt,
                "continuation": len(nll),
                "nll": float(nll.mean(dtype=np.float64)),
                "nll_error": float(nll.std(ddof=1) / np.sqrt(len(nll))),
                **_evals.bytes_after(lm, c.prompt),
                "seconds": time.perf_counter() - started,
            }
            progress.update(count * tokens)


def retrieval(c: ConfigDict, family: str, lm: LM) -> Subject:
    """The model as it is asked for passkeys; its rows have the bytes of those of its losses."""
    return dataclasses.replace(
        _evals.subject(c, lm),
        facts=lambda length, needles: {"family": family, **_evals.bytes_after(lm, c.prompt)},
    )


def plot(rows: list[Row]) -> Mapping[str, Figure]:
    def of(measured: str) -> list[Row]:
        return [{**row, "cache_mib": row["cache_bytes"] / 2**20} for row in rows
                if row["measured"] == measured]  # fmt: skip

    by_bytes = {"x": "cache_mib", "by": "family", "log_x": True, "x_label": "keys and values (MiB)"}
    by_length = {"x": "position", "by": "policy", "log_x": True, "log_y": True,
                 "x_label": "text before the token (tokens)"}  # fmt: skip
    return {
        "kv_cache": plots.curves(
            of("loss"), y="nll", y_label="continuation (nats/token)", **by_bytes
        ),
        "passkey": plots.curves(
            of("passkey"), y="score", y_label="keys found (share)", y_limits=(-0.04, 1.04),
            interval=("low", "high"), **by_bytes,
        ),
        "decode_cost": plots.curves(of("cost"), y="ms_per_token", y_label="time per token (ms)",
                                    interval=("low", "high"), **by_length),
        "cache_bytes": plots.curves(of("cost"), y="cache_mib", y_label="keys and values (MiB)",
                                    **by_length),
    }  # fmt: skip


def table(rows: list[Row]) -> list[Row]:
    """A policy and capacity a line; the time of a token where it was measured."""
    losses = [row for row in rows if row["measured"] == "loss"]
    full = {row["policy"]: row["nll"] for row in losses}.get("full")
    keys = {row["policy"]: score.interval_text(row) for row in rows if row["measured"] == "passkey"}
    cost = [row for row in rows if row["measured"] == "cost"]
    by_position = tables.pivot(cost, index="policy", columns="position", value="ms_per_token")
    cost_of = {line.pop("policy"): line for line in by_position}
    return [
        {
            "policy": row["policy"],
            "cache (MiB)": row["cache_bytes"] / 2**20,
            "state (MiB)": row["state_bytes"] / 2**20,
            "nats/token": row["nll"],
            "− full": None if full is None else row["nll"] - full,
            "keys found": keys.get(row["policy"]),
            **{f"ms after {int(n):,}": x for n, x in cost_of.get(row["policy"], {}).items()},
        }
        for row in losses
    ]


if __name__ == "__main__":
    main(run, plot, table=table, resumes=True)

"""The page docs/results.md, and the table of README.md."""

import json
import re
from typing import Any

from docs.tables.rows import LABELS, ROOT, Rows, benchmark, markdown, with_table
from lminf.evals import score
from lminf.experiments import effective_length, long_context_loss, long_context_retrieval
from lminf.run import tables

WIDE = "lm_infinite:window=4096,sinks=10"
POLICIES = {
    "full": "Full attention",
    "window:window=4096": "Window 4,096",
    WIDE: "LM-Infinite, window 4,096, 10 sinks",
    "lm_infinite:window=2048,sinks=10": "LM-Infinite, window 2,048, 10 sinks",
    "re-read": "Re-reading",
}


def block(start: int) -> str:
    """The head of a column of 2,048 positions."""
    return f"{start // 1024}k–{start // 1024 + 2}k"


def length_generalization() -> str:
    rows = Rows("length_generalization")
    starts = sorted({row["start"] for row in rows.rows})
    lines = [["nats/token", *map(block, starts), "seconds"]]
    for policy, name in POLICIES.items():
        cells = [
            rows.link(lambda row: f"{row['nll']:.3f}", policy=policy, start=start)
            for start in starts
        ]
        took = rows.link(lambda row: f"{row['seconds']:.0f}", policy=policy, start=0)
        lines.append([name, *cells, took])
    return markdown(lines)


SELECTIVE = {
    "lm_infinite:window=2048,sinks=10": "LM-Infinite",
    "streaming:window=2048,sinks=10": "StreamingLLM",
    "topk:window=2048,sinks=10,topk=20,at=8,from_layer=4": "LM-Infinite with top-k",
    "infllm:window=1024,sinks=10,topk=16,block=64,repr_topk=4,exec_block=512": "InfLLM",
}


def passkeys_by_depth() -> str:
    """Passkeys retrieved from prompts longer than the training length, by depth of the key."""
    by_length = {length: Rows(name) for length, name in
                 ((16_384, "long_context_eval"), (32_768, "long_context_eval_long"))}  # fmt: skip
    passkeys = [row for row in by_length[16_384].rows if row["task"] == "passkey"]
    depths = sorted({row["depth"] for row in passkeys})
    lines = [["passkeys found at depth", *(f"{100 * depth:.0f} %" for depth in depths)]]
    for length, rows in by_length.items():
        measured_policies = {row["policy"] for row in rows.rows}
        for policy, name in SELECTIVE.items():
            if policy not in measured_policies:
                continue
            cells = [
                rows.link(
                    score.count_text,
                    task="passkey", policy=policy, length=length, depth=depth,
                )
                for depth in depths
            ]  # fmt: skip
            lines.append([f"{length:,} tokens, {name}", *cells])
    return markdown(lines)


def aggregated(module: Any, *runs: str) -> str:
    """The experiment's own tables of several runs: means over documents with intervals, which are
    of many rows each, so that there is no line to link to.
    """
    lines = [line for run in runs for line in module.table(Rows(run).rows)]
    return tables.markdown(lines) + "\n"


def retrieval() -> str:
    """What policies keep of what has left every window."""
    return "\n".join(
        aggregated(long_context_retrieval, f"long_context_retrieval{run}")
        for run in ("", "_short", "_qwen")
    )


def answers() -> str:
    """How many questions each policy answers, by length."""
    return "\n".join(
        aggregated(effective_length, f"effective_length{run}")
        for run in ("_qwen", "", "_policies", "_short")
    )


def claims() -> str:
    """Differences of losses between policies, by kind of text."""
    return "\n".join(
        aggregated(long_context_loss, run)
        for run in (
            "long_context_loss_short",
            "long_context_loss_distance",
            "long_context_loss_copies",
        )
    )


def decoding() -> str:
    """Time and cache of the next token, by how many tokens came before it."""
    rows = Rows("decode_cost")

    def cost(policy: str, position: int) -> str:
        milliseconds, mebibytes = (
            rows.link(text, policy=policy, position=position)
            for text in (
                lambda row: f"{row['ms_per_token']:.0f} ms",
                lambda row: f"{row['cache_bytes'] / 2**20:.0f} MiB",
            )
        )
        return f"{milliseconds}, {mebibytes}"

    return markdown([
        ["next token after", "Full attention", "LM-Infinite, window 4,096, 10 sinks"],
        ["4,096 tokens", cost("full", 4096), cost(WIDE, 4096)],
        ["16,384 tokens", cost("full", 16384), cost(WIDE, 16384)],
        ["100,000 tokens", "–", cost(WIDE, 100_000)],
    ])  # fmt: skip


def passkeys_by_length() -> str:
    rows = Rows("passkey")

    def correct(policy: str, length: int, depth: float) -> str:
        return rows.link(
            score.count_text,
            policy=policy, length=length, depth=depth,
        )  # fmt: skip

    def cell(policy: str, length: int) -> str:
        return f"{correct(policy, length, 0.1)} early, {correct(policy, length, 0.9)} late"

    lines = [["passkeys found in", "Full attention", "LM-Infinite, window 4,096, 10 sinks"]]
    for length in (3300, 8000, 10_000):
        lines.append([f"{length:,} tokens", cell("full", length), cell(WIDE, length)])
    return markdown(lines)


APPROACHES = {
    "approach 1, equal compute": "isoflop-huber",
    "approach 2, derivative": "derivative",
    "approach 3, loss, as released": "loss-reference",
    "approach 3, one covariate": "loss-consistent-reference",
    "approach 3, true tokens": "loss-tokens",
}


KEPT = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8, float32 activations": "int8",
    "int8, bfloat16 activations": "int8 under bfloat16",
}


def weights_speed() -> str:
    """Memory and speed by how the weights are kept: benchmarks/results/weights-speed.jsonl."""
    lines = [["weights", "memory", "ms a token after 512", "after 4,096", "tokens/s read"]]
    for row in benchmark("weights-speed"):

        def time(context: int, row: dict[str, Any] = row) -> str:
            milliseconds = row[f"ms_per_token_after_{context}"]
            return f"{milliseconds:.0f} ({row[f'time_of_float32_after_{context}']:.2f} ×)"

        read = f"{row['read_tokens_per_second']:.0f} ({row['read_speed_of_float32']:.2f} ×)"
        memory = f"{row['weights_bytes'] / 1e6:.0f} MB"
        lines.append([KEPT[row["weights"]], memory, time(512), time(4096), read])
    return markdown(lines)


def weights_nll() -> str:
    """Loss in int8 beside float32 by policy: benchmarks/results/weights-nll.jsonl."""
    lines = [["policy", "tokens", "float32", "int8", "difference (95 %)"]]
    for row in benchmark("weights-nll"):
        difference = f"{row['difference']:+.4f} ± {row['half_width']:.4f}"
        losses = [f"{row[f'nll_{kept}']:.4f}" for kept in ("float32", "int8")]
        lines.append([f"`{row['policy']}`", f"{row['tokens']:,}", *losses, difference])
    return markdown(lines)


def beside_peers_on_epyc() -> str:
    return beside_peers("epyc")


def full_beside_transformers() -> str:
    return beside_peers("epyc-full")


def beside_peers_on_xeon() -> str:
    return beside_peers("xeon")


def beside_peers(processor: str) -> str:
    """Reading and decoding beside other libraries: benchmarks/results/compare-PROCESSOR.json."""
    found = json.loads((ROOT / f"benchmarks/results/compare-{processor}.json").read_text())
    lines = [["work", "lminf", "beside", "measured", "goal", "reached"]]
    for goal in found["goals"]:
        sides = [
            f"{goal[side]}, {cost_of(found, goal['work'], goal[side])}" for side in ("ours", "peer")
        ]
        if "times_faster" in goal:
            low, high = goal["range"]
            spread = f" ({low:.2f}–{high:.2f})" if low < high else ""
            shown = f"{goal['measured']:.2f} × as fast{spread}"
            wanted = f"{goal['times_faster']} ×"
        else:
            shown = f"{goal['measured']:.2f} × the memory"
            wanted = f"at most {goal['at_most_times_the_memory']} ×"
        lines.append([goal["work"], *sides, shown, wanted, "yes" if goal["reached"] else "no"])
    return markdown(lines)


def products() -> str:
    """What the products of a token alone cost: benchmarks/results/products.jsonl."""
    lines = [["work", "whole step", "products alone", "q, k, v and gate, up merged"]]
    for row in benchmark("products"):
        cells = []
        for name in ("whole", "products", "merged products"):
            low, share, high = row["share_of_whole"][name]
            shown = f"{row['processor_ms_per_token'][name]:.2f} ms"
            cells.append(
                shown if name == "whole" else f"{shown}, {share:.2f} ({low:.2f}–{high:.2f})"
            )
        lines.append([f"{row['work']} after {row['context']:,}", *cells])
    return markdown(lines)


def cost_of(found: dict[str, Any], work: str, side: str) -> str:
    """Median time of a token under one side."""
    summary = found["summary"][f"{work} {side}"]
    return f"{summary['ms_per_token']:.{2 if work == 'read' else 0}f} ms"


def vocabularies() -> str:
    """The recommended vocabulary of a model, and what each refitted approach predicts, with its
    interval."""

    def cell(row: dict[str, Any]) -> str:
        low, high = ("open" if row[end] is None else f"{row[end]:,.0f}" for end in ("low", "high"))
        if row.get("determined") is False:
            return f"not determined ({low}–{high})"
        return f"{row['vocab']:,.0f} ({low}–{high})"

    rows = Rows("vocab_law")
    versions = {row["law"].rpartition("-")[0]: row["law"] for row in rows.rows if "law" in row}
    sizes = {"3B": 3e9, "7B": 7e9, "13B": 13e9, "70B": 70e9}
    lines = [["vocabulary", *(f"for {size}" for size in sizes)]]
    lines.append(["recommended"] + [
        rows.link(cell, part="recommendation", n_nv=n_nv, tokens=None) for n_nv in sizes.values()
    ])  # fmt: skip
    for name, law in APPROACHES.items():
        cells = [
            rows.link(cell, part="prediction", law=versions[law], n_nv=n_nv)
            for n_nv in sizes.values()
        ]
        lines.append([name, *cells])
    return markdown(lines)


LAWS = {
    "step": "step law", "fixed": "one setting for all", "microsoft": "Microsoft",
    "porian": "Porian et al.", "deepseek": "DeepSeek", "openai-lr": "OpenAI (rate)",
}  # fmt: skip


def regrets() -> str:
    """Loss at each law's learning rate and batch, above the least loss of the published grids."""
    rows = Rows("step_law")
    cells = [
        rows.link(
            lambda row: f"{row['linear']:.1f} ({row['low']:.1f}–{row['high']:.1f})",
            part="gap", law=law,
        )
        for law in LAWS
    ]  # fmt: skip
    return markdown([["learning rate and batch by", *LAWS.values()], ["per mille (95 %)", *cells]])


def training() -> str:
    rows = Rows("train_throughput")
    speeds: dict[int, dict[str, float]] = {}
    for row in rows.rows:
        if row["part"] == "speed":
            speeds.setdefault(row["round"], {})[row["side"]] = row["tokens_per_second"]
    by_ratio = sorted(speeds, key=lambda one: speeds[one]["lminf"] / speeds[one]["torch"])
    middle = by_ratio[len(by_ratio) // 2]  # both sides of one round: the machine is shared
    ours, theirs = (
        rows.link(
            lambda row: f"{row['tokens_per_second']:,.0f}", part="speed", side=side, round=middle
        )
        for side in ("lminf", "torch")
    )
    return markdown([["tokens/s", "lminf", "torch"], ["10M parameters", ours, theirs]])


PAGE = """\
# Results

The main measurements of this repository. A number links to the row of `rows.jsonl` that it was read
from; means over documents are of many rows, which their report stands beside. The page is generated
by `docs/make_tables.py`. [Experiments](experiments.md) has the
complete tables and the expected results; [Kernels](kernels.md#on-a-cpu) has the timings of kernels.
Unless a section says otherwise, the model is SmolLM2-135M-Instruct (trained at 8,192 tokens), in
float32 on two CPU cores.

## Loss past the training length

`python -m experiments.length_generalization` ([report](results/length_generalization/report.md)).
One text of 16,384 tokens, the Python language reference; each cell is the mean over 2,048 tokens.
Re-reading gives every token a fresh full-attention context of at most 8,192 tokens: the reference
that windowed attention replaces. Between 6k and 8k, 13 % of the tokens end an exact copy of 17
tokens from more than 4,096 back, which no window has: the next section shows the loss without them.
It is one text, so the table has no intervals.

{length_generalization}
## What sinks, the distance limit and the window are worth

`python -m experiments.long_context_loss --config=:short`
([report](results/long_context_loss_short/report.md)), `--config=:distance`
([report](results/long_context_loss_distance/report.md)) and `--config=:copies`
([report](results/long_context_loss_copies/report.md)): differences of losses in nats/token,
document by document, with their 95 % bootstrap interval over documents where there are three or
more. `copied from far back` is the share of tokens that end an exact copy of 17 tokens from outside
the window. `lambda` is LM-Infinite without its distance limit, and `window` is that without sinks.

{claims}
## What is kept of tokens that have left the window

`python -m experiments.long_context_retrieval` ([report](results/long_context_retrieval/report.md)),
`--config=:short`, which has every policy at 4,096 tokens
([report](results/long_context_retrieval_short/report.md)), and `--config=:qwen`
([report](results/long_context_retrieval_qwen/report.md)), of Qwen2.5-Coder-0.5B-Instruct, trained
at 32,768 tokens; all in bfloat16. Each document is prose of its own, with a key and value of its
own at every depth. Copy gain: how much likelier 24 tokens of it are, after a cue of 8, than after
another document. Needle margin: log-probability of a key's value against values that are not in the
document. Key-value margin and rank: against the other values asked for (rank 1 of 8 is best, 4.5 is
chance). Means over documents with 95 % bootstrap intervals, of the 8 depths that are farther than
1,034 tokens from the end; `inside` is a sentence within 1,034 tokens, which policies with shorter
windows have to find too. Memory is what is kept of the document: rotated keys that a policy keeps
for its far distances count, and SnapKV and ThinK count after their compression.

{retrieval}
## Which questions are answered

`python -m experiments.effective_length --config=:qwen`
([report](results/effective_length_qwen/report.md)), of Qwen2.5-Coder-0.5B-Instruct, trained at
32,768 tokens; then SmolLM2 without an argument ([report](results/effective_length/report.md)), with
`--config=:policies` ([report](results/effective_length_policies/report.md)) and with
`--config=:short` ([report](results/effective_length_short/report.md)); all in bfloat16. A task is
defined in [Evaluation](evaluation.md#tasks): `niah_multikey` has the likeliest of five numbers that
stand in the prose, at any depth, so chance is 0.2; `babilong` that of six places, and
`common_words` that of eight words. 50 questions a cell, in all but `common_words` several about a
text, with 95 % intervals that account for it. Attended tokens and memory are those of the longest
prompt.

{answers}
## Passkeys by depth

`python -m experiments.long_context_eval` and `--config=:long`
([report](results/long_context_eval/report.md), [report at 32,768
tokens](results/long_context_eval_long/report.md)). Two prompts in each cell: correct answers /
prompts. These rows asked for the same two keys in the same filler at every depth, so a line of the
table rests on 2 prompts, not on 20; since then every cell has keys of its own. Policies attend to
2,058 tokens, top-k to 2,078. Losses of these policies up to 32,768 tokens are in a [report of their
own](results/long_context_eval_loss/report.md), and ten policies at 4,096 tokens in
[another](results/long_context_eval_all/report.md).

{passkeys_by_depth}
## Passkeys by length

`python -m experiments.passkey` ([report](results/passkey/report.md)). Correct answers / prompts,
with the key at 10 % (early) and at 90 % (late) of the prompt. The prompts of a cell differ in their
keys alone; [the table](experiments.md#passkey) has the intervals.

{passkeys_by_length}
## Decoding

`python -m experiments.decode_cost` ([report](results/decode_cost/report.md)). Median time of 24
tokens and the size of the cache. [What a smaller cache costs in
quality](results/kv_cache/report.md) is measured by `python -m experiments.kv_cache`.

{decoding}
## Weights in int8 and bfloat16

`python -m benchmarks.weights speed` on an Intel Xeon with AMX, whose two cores other work shared:
medians of 64 tokens under full attention, and of seven chunks of 512 tokens behind 512. All models
take turns in one process; in parentheses, the median ratio to the float32 of the same turn, which
says more than the times of a busy machine. In int8 a token that is
written reads a quarter of the bytes; a text that is read is multiplied in float32 or bfloat16, for
which the weights are converted first.

{weights_speed}
`python -m benchmarks.weights nll`, and with `--length=2048` the others: the first tokens of the
same text, nats/token, at most 1,034 attended tokens where a number limits them; prompts of 1,536
tokens where a policy acts at their end. Intervals are of the paired difference, from means of 64
tokens.

{weights_nll}
## Vocabulary size

`python -m experiments.vocab_law` ([report](results/vocab_law/report.md)), refitted to all 1,200
published rows. The recommended vocabulary wastes the fewest FLOPs by the worst loss law; its range
is over other laws, rows and FLOPs limits. The intervals of the approaches are of 300 bootstrap
draws over runs (95 %), of approach 2 a spread of anchors; an open one has draws without an optimum
between 256 and 1,000,000 entries. [Scaling laws](scaling_laws.md#one-vocabulary-or-none) has the
rule. A sweep on a laptop is in [studies](studies/vocab_sweep/report.md).

{vocabularies}
## Learning rate and batch size

`python -m experiments.step_law` ([report](results/step_law/report.md)): the loss at each law's
setting above the least loss, mean of all 17 published grids (1,911 runs) and its interval over
grids, interpolated linearly. One setting for all is a rate of 2^-9 and 192 sequences for every
model. A sweep on a laptop is in [studies](studies/step_sweep/report.md).

{regrets}
## Training speed

`python -m experiments.train_throughput` ([report](results/train_throughput/report.md)): the median
of three rounds on two cores of an AMD EPYC (Zen 5), beside a plain torch loop of the same shape. On
an Intel Xeon with AMX lminf trained 0.85 times as fast as torch, in three rounds
(`benchmarks/results/train-throughput-xeon.jsonl`).

{training}
## Speed beside transformers and llama.cpp

`python -m benchmarks.compare --peer=PYTHON`, where PYTHON has the extra `benchmarks`: SmolLM2-135M
reads 16,384 tokens and writes 32 after 4,096, in turns. Times are of a token. transformers' weights
are float32 unless it says otherwise; llama.cpp's are the 4 bits of the file, and it reads 8,190
tokens, its most, without their losses. On two cores of an AMD EPYC (Zen 5, with AVX-512 and
products of bfloat16), three rounds: medians, and the range of the ratios.

{beside_peers_on_epyc}
Full attention read 2,048 tokens at a time there. On a CPU it reads 1,024 now, which takes less
memory: three rounds of `--work read --only transformers full`.

{full_beside_transformers}
Of its peak, 0.54 GB are weights and 0.76 GB the text's keys and values (`lminf plan`), which
transformers does not keep when it reads a text at once.

On two cores of an Intel Xeon with AMX, an older version in one round:

{beside_peers_on_xeon}
`python -m benchmarks.products` shows what part of that is products with the weights, which no step
can be faster than, on the same EPYC: processor time of a token under full attention on one device,
of its products alone, and of these with q, k and v, and gate and up, merged into one each; beside
them their share of the whole step of the same turn, the median of seven and its range. So a token
could be decoded in 0.55 of the time at best. Merged products gain less than turns differ by, so the
weights stay apart.

{products}
{targets}"""


def page() -> str:
    """The page docs/results.md."""
    builders = (
        length_generalization, claims, retrieval, answers, passkeys_by_depth, passkeys_by_length,
        decoding, weights_speed, weights_nll, vocabularies, regrets, training, beside_peers_on_epyc,
        full_beside_transformers, beside_peers_on_xeon, products,
    )  # fmt: skip
    built = {builder.__name__: builder() for builder in builders}
    names = {label: name for name, label in LABELS.items()}
    labels = dict.fromkeys(re.findall(r"\]\[([a-z]+)(\d+)\]", "".join(built.values())))
    targets = "".join(
        f"[{label}{line}]: results/{names[label]}/rows.jsonl#L{line}\n" for label, line in labels
    )
    return PAGE.format(**built, targets=targets)


# --- README ---------------------------------------------------------------------------------------

METHODS = {
    "lm_infinite": "LM-Infinite",
    "sirllm": "SirLLM",
    "infllm": "InfLLM",
    "infinite_hip": "InfiniteHiP",
    "rerope": "ReRoPE",
    "full": "Full attention",
}


def methods() -> str:
    """What methods keep of a document against what they cost, at the lengths of the rows."""
    lines = long_context_retrieval.summary(Rows("long_context_retrieval").rows)
    found = {(each["policy"].partition(":")[0], each["length"]): each for each in lines}
    short, long = sorted({each["length"] for each in lines})
    cells = [["copy gain (nats/token)", f"keeps of {long:,} tokens", "attends to",
              f"after {short:,} tokens", f"after {long:,} tokens"]]  # fmt: skip
    for kind, name in METHODS.items():
        near, far = found[kind, short], found[kind, long]
        gains = [score.value_text(each["copy_gain"]) for each in (near, far)]
        cells.append([name, f"{far['cache_bytes'] / 1e6:.0f} MB", f"{far['attended']:,}", *gains])
    return markdown(cells)


def readme() -> str:
    """README.md with the table of methods."""
    return with_table(ROOT / "README.md", methods())

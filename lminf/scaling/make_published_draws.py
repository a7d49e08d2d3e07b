"""Writes published_draws.py: the spread that the published laws' intervals are made of.

python -m lminf.scaling.make_published_draws VOCAB.csv STEP.csv
"""

import sys
import textwrap
from pathlib import Path

from lminf.scaling import fertility, tables
from lminf.scaling.steps import StepLaw
from lminf.scaling.vocab_derivative import VocabLaw2
from lminf.scaling.vocab_isoflop import VocabLaw1
from lminf.scaling.vocab_loss import VocabLaw3

KEPT = 100
INDENT = " " * 16
HEADER = '''"""Constants of re-fits over resampled runs and groups; see make_published_draws."""

# fmt: off
'''


def main(vocab_path: str, step_path: str) -> None:
    published = fertility.PUBLISHED
    table = tables.read_vocab(vocab_path, published)
    fits = {
        "isoflop": VocabLaw1().fit(table, fertility=published),
        "derivative": VocabLaw2().fit(table, fertility=published),
        "loss-reference": VocabLaw3("reference").fit(table, fertility=published),
        "loss-tokens": VocabLaw3("tokens").fit(table, fertility=published),
    }
    step = StepLaw().fit(tables.read_step(step_path, 2048))
    fits["step"] = step
    lines = [HEADER, "DRAWS = {"]
    for name, law in fits.items():
        print(name, law.resampling, law.intervals)
        lines.append(f"    {name!r}: {{")
        point = {key: round(value, 7) for key, value in law.constants.items()}
        lines.append("        'point': {")
        lines += [f"            {key!r}: {value}," for key, value in point.items()]
        lines.append("        },")
        lines.append("        'draws': {")
        for key, values in law.draws.items():
            if key in ("alpha_nnv", "alpha_h", "batch_n"):
                continue
            shown = ", ".join(f"{value:.6g}" for value in values[:KEPT])
            lines.append(f"            {key!r}: (")
            lines.append(textwrap.fill(shown, 96, initial_indent=INDENT, subsequent_indent=INDENT))
            lines.append("            ),")
        lines.append("        },\n    },")
    lines.append("}")
    bowl = {k: float(f"{v:.6g}") if k != "groups" else v
            for k, v in step.diagnostics["bowl"].items() if k != "unit"}  # fmt: skip
    lines.append(f"BOWL = {bowl}\n")
    target = Path(__file__).with_name("published_draws.py")
    target.write_text("\n".join(lines).replace("'", '"'), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

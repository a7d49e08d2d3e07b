"""Generated pages: docs/experiments.md, docs/results.md, docs/models.md; tables of three others.

README.md, docs/ngram.md and docs/pipelines.md are written by hand, but for their tables.

    python docs/make_tables.py        writes them all; `make docs` begins with it

They come from the headers of configs/, the committed rows of docs/results/ and docs/studies/, and
the tables of the library; `docs/tables` has a file for each page.
"""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # that of a script is its own folder

from docs.tables import experiments, models, ngram, pipelines, results  # noqa: E402

# Page -> its text.
PAGES: dict[str, Callable[[], str]] = {
    "docs/models.md": models.page,
    "docs/experiments.md": experiments.page,
    "docs/results.md": results.page,
    "README.md": results.readme,
    "docs/ngram.md": ngram.page,
    "docs/pipelines.md": pipelines.page,
}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (ROOT / name).write_text(text(), encoding="utf-8")

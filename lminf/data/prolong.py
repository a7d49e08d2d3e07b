"""The data of ProLong: published shares of its sources, and repositories as long documents.

Source: Gao et al. 2024, "How to train long-context language models (effectively)",
arXiv:2410.02660. Rows of several sources are the plan `mixture` with `plan=best_fit`, whose mask
keeps documents apart; the rotary bases are those of stages (lminf.train.stages).
"""

from collections.abc import Iterable, Mapping, Sequence

from lminf.config import closest
from lminf.data.plans import BestFit, Mixture
from lminf.errors import InputError

# Shares of the tokens of the first stage, of rows of 64 Ki tokens.
SHARES: Mapping[str, float] = {
    "code_repositories": 0.30,
    "books": 0.30,
    "fineweb_edu": 0.10,
    "fineweb": 0.10,
    "stackexchange": 0.04,
    "wikipedia": 0.04,
    "instructions": 0.03,
    "arxiv": 0.03,
    "math_web": 0.03,
    "textbooks": 0.03,
}
ROPE_BASES = (8e6, 1.28e8)  # of the stages of 64 Ki and of 512 Ki tokens


def mixture(sources: Sequence[str]) -> Mixture:
    """The plan for the stores of these sources, in their order; shares of sources that are left out
    go to the others in proportion.
    """
    for name in sources:
        if name not in SHARES:
            raise InputError(f"ProLong has no source {name!r}; {closest(name, SHARES)}")
    return Mixture(tuple(SHARES[name] for name in sources), BestFit())


def join_repositories(files: Iterable[tuple[str, str]]) -> list[str]:
    """A document for each repository, from (repository, text of a file): its files in the order in
    which they come, whatever imports what, with a blank line between; repositories in the order of
    their first files.
    """
    texts: dict[str, list[str]] = {}
    for repository, text in files:
        texts.setdefault(repository, []).append(text)
    return ["\n\n".join(each) for each in texts.values()]

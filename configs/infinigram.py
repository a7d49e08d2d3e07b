"""Agreement of an ∞-gram with texts that its corpus does not hold, and its mixture with a model.

Question   How often does the ∞-gram of a small corpus agree with the next token of held-out text,
           by the length of what matches and by the size of the corpus, and by how much does its
           mixture with a neural model lower perplexity?
Paper      Liu et al. 2024, arXiv:2401.17377 (infini-gram)
Data       apt install linux-doc-6.1 anarchism: the corpus with documents of the same kind that are
           held out, and texts of another kind
Command    python -m experiments.infinigram
Time       not measured
Expected   not measured
Tiny       --config=:tiny trains a byte model at 64 tokens; the corpus is Python's own sources:
           under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"
    c.dtype = "float32"  # of weights, activations and caches
    c.text = "/usr/share/doc/linux-doc-6.1/Documentation/**/*.[rt][sx]t.gz"  # the corpus
    c.other_text = "/usr/share/doc/anarchism/markdown/sec*.md.gz"  # of another kind
    c.corpus_documents = 10_000  # at most, those held out included
    c.parts = (16, 4, 1)  # of the corpus: one document in so many
    c.documents = 12  # held out to measure, and as many of the other kind
    c.validation = 8  # documents that the weights of the mixture are fitted to
    c.length = 1024  # tokens of a document that are measured: one window of the paper
    if arg == "tiny":
        c.model, c.text, c.other_text = "tiny", "code", "reference"
        c.corpus_documents, c.parts = 120, (4, 1)
        c.documents, c.validation, c.length = 3, 2, 64
    return c

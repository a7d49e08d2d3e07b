"""Agreement of an ∞-gram with texts that its corpus does not hold, and its mixture with a model.

Topic      data
Question   How often does the ∞-gram of a small corpus agree with the next token of held-out text,
           by the length of what matches and by the size of the corpus, and by how much does its
           mixture with a neural model lower perplexity?
Paper      Liu et al. 2024, arXiv:2401.17377 (infini-gram)
Data       apt install linux-doc-6.1 anarchism: the corpus with documents of the same kind that are
           held out, and texts of another kind
Command    python -m experiments.infinigram
Time       about 4 minutes of processor time on two busy cores of an Intel Xeon; the same command
           with the same --out resumes
Expected   the ∞-gram of 9.1 M tokens of the kernel's documentation agrees with 22 % of the next
           tokens of 12 documents that were held out (15 to 31; 12,276 tokens), a 5-gram that backs
           off with 20 % and a 3-gram with 14 %; where n is 16 or more with 88 % (477 tokens), where
           it is 2 with 4 %. Of a sixteenth of the corpus the ∞-gram has 14 % (10 to 22). The
           mixture lowers SmolLM2's perplexity from 15.2 to 12.8, 17 % of what is above 1, with
           λ = 0.36 where the estimate is sparse and 0.07 elsewhere. Of prose of another kind the
           ∞-gram agrees with 4 %, and the same mixture raises perplexity from 19.8 to 21.6: weights
           belong to a kind of text. No document of the corpus holds 80 % of the 13-grams of one
           that was held out, so decontamination leaves out none
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

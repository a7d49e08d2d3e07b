"""What rows of new tokens are worth before any training, on a real model and another language.

Question   A tokenizer is given more tokens for a language that it splits finely. What does the
           model lose at first, by what the rows of the new tokens are made of?
Paper      Yamaguchi et al. 2024, arXiv:2406.11477 (align, merge, mean, random rows)
Data       apt install libreoffice-help-el libreoffice-help-en-us: the same pages in two languages
Command    python -m experiments.vocab_expansion
Time       not measured
Expected   not measured
Tiny       --config=:tiny trains a byte model at 64 tokens and adds tokens of Python's own texts:
           under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"
    c.dtype = "float32"  # of weights, activations and caches
    # Of the language of the new tokens: texts they are chosen from, and others to measure.
    c.text = "/usr/share/libreoffice/help/el/text/**/*.html"
    c.other_text = "/usr/share/libreoffice/help/en-US/text/**/*.html"
    c.tokens = (200, 1000)  # new ones; with the old, multiples of 8
    c.rows = ("random", "mean", "merge", "align")  # what their rows are made of
    c.replicates = 2  # draws of random rows
    c.sample_characters = 2_000_000  # of the texts that tokens are chosen from
    c.documents = 16  # of each language to measure, none of which tokens are chosen from
    c.characters = 1200  # of a document that are measured
    if arg == "tiny":
        c.model, c.text, c.other_text = "tiny", "code", "code"
        c.tokens, c.replicates, c.sample_characters = (7, 31), 2, 50_000
        c.documents, c.characters = 3, 400
    return c

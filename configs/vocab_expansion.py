"""What rows of new tokens are worth before and in training, on a real model and another language.

Topic      data
Question   A tokenizer is given more tokens for a language that it splits finely. What does the
           model lose at first, by what the rows of the new tokens are made of, and what does a
           little training on plain text win back, with and without heads for tokens further ahead?
Paper      Yamaguchi et al. 2024, arXiv:2406.11477 (align, merge, mean, random rows, training);
           Dobler and de Melo 2023, arXiv:2305.14481 (focus); Gloeckle et al. 2024,
           arXiv:2404.19737 (multi-token prediction)
Data       apt install libreoffice-help-el libreoffice-help-en-us: the same pages in two languages
Command    python -m experiments.vocab_expansion
Time       about 3 s of processor time a page and vocabulary on two busy cores of an Intel Xeon, 17
           minutes in all; the same command with the same --out resumes
Expected   before any training, pages of Greek cost SmolLM2 0.94 bits/character more than without
           new tokens (0.87 to 1.02; 16 pages, 200 new tokens) with rows of mean, 0.97 with merge
           and 0.98 with align, 1.23 (1.13 to 1.32) with focus and 3.10 (2.90 to 3.24) with random
           rows, but have 1.91 characters a token for 1.20, and 42.5 tokens a sentence for 67.8.
           That align is at least as good as mean does not show: it is 0.042 worse (0.041 to 0.044,
           paired). English is kept, but for 0.05 with random rows. The rows of 200 tokens are
           committed (--config.tokens=(200,)); those of 1,000 resume from there
Training   --config=:training adds 1,000 tokens, which leave 29.1 tokens a sentence of 64.5, and
           trains for 20 steps of 512 tokens; about 10 s of processor time a step. At first Greek
           costs 0.48 bits/character more than without them (0.22 to 0.78; 6 pages) with rows of
           mean, 0.51 with merge, 0.53 with align, 0.85 (0.62 to 1.08) with focus and 2.88 (2.42 to
           3.34) with random ones; after 20 steps 0.43 less (0.15 to 0.64) with rows of mean, 0.14
           less (-0.10 to 0.41) with focus and 0.93 more (0.72 to 1.10) with random ones. The model
           without them is not trained. With a further head for the token after the next, Greek
           costs 0.27 more than without the head at as many steps (0.18 to 0.37, paired): so little
           training does not pay for one. English costs 0.01 more (-0.01 to 0.02) after the
           training of mean rows, 0.11 with random ones. Rows of align and merge are committed
           before training alone; the same command resumes from there
Tiny       --config=:tiny trains a byte model at 64 tokens and adds tokens of Python's own texts:
           under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base

VARIANTS = ("tiny", "training")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    c.model = "smollm2-135m-instruct"
    c.dtype = "float32"  # of weights, activations and caches
    # Of the language of the new tokens: texts they are chosen from, and others to measure.
    c.text = "/usr/share/libreoffice/help/el/text/**/*.html"
    c.other_text = "/usr/share/libreoffice/help/en-US/text/**/*.html"
    c.tokens = (200, 1000)  # new ones; with the old, multiples of 8
    c.rows = ("random", "mean", "merge", "align", "focus")  # what their rows are made of
    c.replicates = 2  # draws of random rows
    c.sample_characters = 2_000_000  # of the texts that tokens are chosen from
    c.documents = 16  # of each language to measure, none of which tokens are chosen from
    c.characters = 1200  # of a document that are measured
    # Training on those texts: after so many steps models are measured again. None: before it alone.
    c.steps = ()
    c.layers = 2  # trained at either end, with embeddings and head
    c.mtp_heads = 1  # heads for tokens further ahead, in training
    c.mtp_rows = ()  # of the rows those that are trained with them too
    c.length, c.batch = 512, 1  # tokens of a row, rows of a step
    c.optimizer = "adamw:b2=0.999,weight_decay=0.01"
    c.schedule = "cosine:peak=5e-4,floor=5e-5,warmup=3"
    if arg == "training":
        c.tokens, c.replicates = (1000,), 1
        c.steps, c.mtp_rows = (8, 20), ("mean",)
        c.documents, c.characters = 6, 600
    if arg == "tiny":
        c.model, c.text, c.other_text = "tiny", "code", "code"
        c.tokens, c.replicates, c.sample_characters = (7,), 1, 50_000
        c.documents, c.characters = 3, 400
        c.steps, c.layers, c.mtp_rows, c.length = (2,), 1, ("mean",), 32
        c.schedule = "cosine:peak=5e-4,floor=5e-5,warmup=1"
    return c

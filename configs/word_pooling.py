"""Words as a few vectors against bytes, characters and subwords, by the next words they expect.

Topic      data
Question   Does a model that pools the units of a word into a few vectors expect the right next word
           more often than one of bytes, characters or subwords, and is that so of rare words?
Paper      Learn Your Tokens (Thawani et al. 2023, arXiv:2310.11628)
Command    python -m experiments.word_pooling
Time       about 10 minutes of processor time on two busy cores of an Intel Xeon, in several calls;
           the same command with the same --out resumes
Expected   after 300 steps of 64 words, three seeds, 95 % intervals: subwords expect 8.3 % of the
           next words (5.6 to 11.1), bytes 5.6 (4.5 to 6.8), characters 5.6 (3.2 to 8.0) and pooled
           words 4.2. In nats a word pooled words are 10.43 (10.23 to 10.63), below characters,
           11.29 (10.85 to 11.74), and bytes, but above subwords, 9.03 (8.78 to 9.29). No model
           gets a word right that it read fewer than 10 times, so what the paper says of rare words
           does not show. The rate and the layers of each part were chosen by the loss of pooled
           words, which favours them, and all models have seen far too little
Tiny       --config=:tiny: one layer a part, 8 steps on the interpreter's documentation: under a
           minute
Pod        --config=:pod: the paper's shape, 8 layers of width 512 and 128 words, on a text of
           one's own (text=FILES); not run here
"""

from ml_collections import ConfigDict

from lminf.configs import base
from lminf.configs.train_lm import shape

VARIANTS = ("tiny", "pod")


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg, variants=VARIANTS)
    # The others are ordinary decoders of the pooled model's width and number of layers in all.
    c.models = ("word pooling", "subword", "character", "byte")
    c.text = "reference"  # of this Python; or files of text or HTML, a pattern
    c.held_out = 0.08  # share of the text's rows
    c.words = 32  # of a row; the second half of held-out rows is measured
    c.contexts = 200  # held-out rows that are read
    c.longest = 12  # characters of a word: longer ones are cut in the text, for all models
    c.vocab = 1024  # subwords
    c.slots = 4  # vectors of a word
    c.encoder_layers, c.decoder_layers = 1, 2
    c.model = shape(width=64, layers=1, heads=1, kv_heads=1, hidden=128)  # of the backbone
    c.batch = 2  # rows of a step
    c.steps = 300
    c.replicates = 3  # seeds from c.seed on: initial parameters and order of the rows
    c.optimizer = "adamw:b2=0.95,weight_decay=0.1"
    c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=30"
    if arg == "tiny":
        c.words, c.contexts, c.held_out = 8, 8, 0.01
        c.model = shape(width=32, layers=1, heads=2, kv_heads=2, hidden=32)
        c.decoder_layers = 1
        c.vocab, c.slots, c.batch, c.steps, c.replicates = 300, 2, 4, 8, 2
        c.schedule = "cosine:peak=4e-3,floor=4e-4,warmup=2"
    elif arg == "pod":
        c.model = shape(width=512, layers=8, heads=8, kv_heads=8, hidden=1408)
        c.encoder_layers = c.decoder_layers = 2
        c.words, c.vocab, c.batch, c.steps = 128, 32_768, 64, 20_000
        c.schedule = "cosine:peak=1e-3,floor=1e-4,warmup=300"
    return c

"""A chat model after training on plain text of another language, with and without repair.

Topic      data
Question   A chat model gets tokens of another language and is trained on plain text of it. What is
           left of its chat behaviour, and what does repair without training bring back?
Paper      ElChat (Yamaguchi et al. 2024, arXiv:2412.11704), and the training of arXiv:2406.11477
Data       apt install libreoffice-help-el libreoffice-help-en-us: the same pages in two languages
Command    python -m experiments.chat_repair
Time       took 12 minutes beside other work on two cores of an Intel Xeon, half of it training; the
           same command with the same --out resumes
Expected   60 steps of 256 tokens bring Greek from 3.43 bits/character to 2.24 (1.80 to 2.50; 4
           pages), where the chat model has 2.67 without the new tokens, and leave English as it was
           (0.02). Chat behaviour suffers: of 12 answers 4 are in form, 6 before, and the chat
           model's own answers take 0.16 nats/token more (0.06 to 0.33). Repaired 10 are in form, a
           difference of 0.50 in share (0.17 to 0.83, paired), and those answers take 0.08 less
           (0.04 to 0.14), for 0.09 bits/character of the Greek (0.07 to 0.10). Linear and spherical
           interpolation are not told apart
Tiny       --config=:tiny trains a byte model at 64 tokens, which does not chat: under 2 minutes
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.model = "smollm2-135m-instruct"
    # Of the language of the new tokens: texts to choose them from and to train on, and others to
    # measure.
    c.text = "/usr/share/libreoffice/help/el/text/**/*.html"
    c.other_text = "/usr/share/libreoffice/help/en-US/text/**/*.html"
    c.versions = ("chat", "expanded", "trained", "linear", "spherical")
    c.tokens = 200  # new ones
    c.sample_characters = 2_000_000  # of the texts that tokens are chosen from and trained on
    c.rows = "mean"  # what their rows are made of
    # Of the chat model in the first and the last layers, where it is repaired. As many layers are
    # trained, with the embeddings and the head.
    c.chat_shares = (0.3, 0.5, 0.5, 0.3)
    c.length, c.batch, c.steps = 256, 1, 60  # tokens of a row, rows of a step
    c.optimizer = "adamw:b2=0.999,weight_decay=0.01"
    c.schedule = "cosine:peak=5e-4,floor=5e-5,warmup=3"
    c.questions, c.max_new_tokens = 12, 40  # asked, and tokens of an answer at most
    c.documents = 4  # pages of each language to measure
    c.characters = 600  # of a page
    if arg == "tiny":
        c.model, c.text, c.other_text = "tiny", "code", "code"
        c.tokens, c.sample_characters = 7, 50_000
        c.chat_shares, c.length, c.steps = (0.3, 0.3), 32, 3
        c.questions, c.max_new_tokens, c.documents, c.characters = 2, 4, 3, 200
        c.schedule = "cosine:peak=5e-4,floor=5e-5,warmup=1"
    return c

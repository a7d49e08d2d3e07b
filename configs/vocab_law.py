"""Vocabulary size by budget: three approaches, two metrics, and their uncertainty.

Topic      scaling
Question   Do the three approaches to the optimal vocabulary agree with each other and with the
           data?
Paper      Scaling Laws with Vocabulary (Tao et al. 2024, arXiv:2407.13623)
Command    python -m experiments.vocab_law --config.data=../shared/data/scaling_vocab/exp_data.csv
Data       exp_data.csv of github.com/sail-sg/scaling-with-vocab; --config.data= generates a small
           sweep
Time       ten minutes on two CPU cores shared by four, half of it resampling
Expected   all 1,200 rows: V 28K at 3B, 43K at 7B, 53K at 13B, not determined at 70B and 15T
           tokens; approach 1 44,026 at 3B, approach 3 as released 36.5K, 60.4K at 70B with one
           covariate
Tiny       --config=:tiny generates a small sweep from the published law, too small to recover it at
           7B: seconds
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.data = "../shared/data/scaling_vocab/exp_data.csv"  # "" draws a synthetic sweep
    c.draws = 300  # bootstrap draws over runs
    c.n_nv = (3e9, 7e9, 13e9, 70e9)  # parameters of the models that V is predicted for
    c.profile = (-2.0, -1.0, -0.5, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # alpha2
    c.sensitivity = True  # refit under every choice: half of the time
    if arg == "tiny":
        c.data = ""
        c.draws = 20
        c.n_nv = (3e9, 7e9)
        c.profile = (0.5, 1.0, 2.0)
        c.sensitivity = False
    return c

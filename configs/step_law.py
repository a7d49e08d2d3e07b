"""Learning rate and batch size: the step law, competing laws, and the cost of their errors.

Topic      scaling
Question   How far above the least loss of an exhaustive grid is each law's setting?
Paper      Step Law (Li et al. 2025, arXiv:2503.04715)
Command    python -m experiments.step_law --config.data=../shared/data/steplaw/dense_lr_bs_loss.csv
Data       dense_lr_bs_loss.csv of github.com/step-law/steplaw; --config.data= generates small grids
Time       a few seconds on two CPU cores
Expected   per mille, mean of all 17 groups (95 %): step 1.2 (0.9-1.5), refit without the group 1.1,
           one setting for every model 2.9, the next law 6.5; a fit 78 N^-0.77 D^0.20
Tiny       --config=:tiny generates grids from the published law: seconds
"""

from ml_collections import ConfigDict

from lminf.configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.get_config(arg)
    c.data = "../shared/data/steplaw/dense_lr_bs_loss.csv"  # "" draws synthetic grids
    c.seq_len = 2048  # tokens, for files without the column
    c.draws = 1000  # bootstrap draws, over groups and over rows
    c.threshold = 0.0025  # relative excess of the runs that are regressed
    c.laws = ("step", "openai-lr", "microsoft", "deepseek", "porian", "moonlight", "fixed")
    if arg == "tiny":
        c.data = ""
        c.draws = 50
        c.laws = ("step", "deepseek")
    return c

"""Published constants as named law versions, usable without any data.

They are stored in published.json, in the format that `Law.save` writes. Their intervals are this
project's own: the spread of re-fits to all six families (1,200 rows) and all 17 groups, over
resampled runs and groups; those of the step law are moved so that the re-fit falls on the published
constants. tests/scaling/make_published.py makes the draws.

The exponent of approach 1 is printed as 0.41636; stored are the digits that reproduce all fourteen
printed vocabularies. N_v of approach 2's anchor is 6144 x 512.
"""

import dataclasses
from typing import Any

from lminf.scaling import KINDS, laws, stored
from lminf.scaling.chinchilla import ChinchillaLaw
from lminf.scaling.steps import StepLaw
from lminf.scaling.vocab_derivative import DerivativeLaw
from lminf.scaling.vocab_isoflop import IsoflopLaw
from lminf.scaling.vocab_loss import LossLaw

LAWS: dict[str, Any] = {
    data["version"]: laws.from_json(data, KINDS, "published.json")
    for data in stored.read("published.json")
}
ISOFLOP: IsoflopLaw = LAWS["tao2024-isoflop"]
DERIVATIVE: DerivativeLaw = LAWS["tao2024-derivative"]
LOSS_REFERENCE: LossLaw = LAWS["tao2024-loss"]
LOSS_TOKENS: LossLaw = LAWS["tao2024-loss-tokens"]
LOSS_CONSISTENT = dataclasses.replace(
    LOSS_REFERENCE,
    version="tao2024-loss-consistent",
    procedure={**LOSS_REFERENCE.procedure, "mode": "consistent-reference"},
    warnings=LOSS_REFERENCE.warnings[:1],  # not that its two covariates differ
)
STEP: StepLaw = LAWS["li2025-step"]
HOFFMANN: ChinchillaLaw = LAWS["hoffmann2022"]
REFIT: ChinchillaLaw = LAWS["besiroglu2024"]  # of the same data

VOCAB_LAWS = {
    law.version: law for law in (ISOFLOP, DERIVATIVE, LOSS_REFERENCE, LOSS_CONSISTENT, LOSS_TOKENS)
}

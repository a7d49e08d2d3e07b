"""Families of models by the `model_type` of their config.json."""

from lminf.checkpoints.families import bloom, gemma, gpt2, llama, mixtures, neox
from lminf.checkpoints.families.family import Family

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **gemma.FAMILIES,
    **mixtures.FAMILIES,
    **neox.FAMILIES,
    **gpt2.FAMILIES,
    **bloom.FAMILIES,
}

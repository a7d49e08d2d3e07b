from dataclasses import dataclass

import numpy as np
import tokenizers


@dataclass(frozen=True)
class Tokenizer:
    backend: tokenizers.Tokenizer

    def encode(self, text: str):
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

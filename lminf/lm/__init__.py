"""Language models for people: LM with its verbs, generation, and what stands behind both."""

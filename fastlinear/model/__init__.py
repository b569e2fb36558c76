"""A whole model: which layers are converted, what they absorb, and reports of it."""

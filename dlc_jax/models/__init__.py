"""Networks. Flax lives here and nowhere else: outside, a model is `init`, `apply` and a nested dict of parameters."""

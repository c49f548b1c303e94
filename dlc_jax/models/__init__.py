"""Networks.

Flax lives here alone: outside, a model is `init`, `apply` and a nested dict of parameters.
"""

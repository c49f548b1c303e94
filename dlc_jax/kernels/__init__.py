"""Computations that have more than one implementation; the plain XLA one is always there."""

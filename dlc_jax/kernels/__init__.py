"""Computations that may have several implementations; the plain XLA one is always there."""

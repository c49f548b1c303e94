"""Codes put together of several images' codes.

mix         copying positions from parents, and what is kept
operators   the ways that a recipe can name; some end on codes that a prior finds likely
groups      positions by the name of what they say
"""

from dlc_jax.composition.operators import OPERATORS as OPERATORS
from dlc_jax.composition.operators import Composed as Composed
from dlc_jax.composition.operators import best as best

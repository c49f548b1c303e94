"""The processes that a recipe can name; `process` says what each offers.

To add one: its module, and a line below.
"""

from dlc_jax.diffusion.ddpm import DDPM
from dlc_jax.diffusion.edm import EDM
from dlc_jax.diffusion.linear import Linear

PROCESSES = {"linear": Linear, "ddpm": DDPM, "edm": EDM}

"""The processes of codes that a recipe can name.

Each has `noise`, `corrupt`, `loss` and `bound`. To add one: its module, a line below, and the
methods of `code_sampler` that can follow it.
"""

from dlc_jax.diffusion.flow import Flow
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.uniform import Uniform

CODE_PROCESSES = {"masked": Masked, "uniform": Uniform, "flow": Flow}

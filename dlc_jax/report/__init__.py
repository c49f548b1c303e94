"""`report.html`, one file that shows what a run made.

`page` joins `pictures`, `curves` and `tables`; `chart` draws, `words` formats.
"""

from dlc_jax.report.page import write

__all__ = ["write"]

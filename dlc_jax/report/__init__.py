"""`report.html`, one file that shows what a run made: `page` writes it, `chart` draws curves, `words` formats."""

from dlc_jax.report.page import write

__all__ = ["write"]

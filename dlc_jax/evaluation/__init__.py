"""Scores of sets of images: from files, through a feature network, to values with their errors.

`evals` has the metrics' mathematics and `features` the networks; here images meet both.
"""

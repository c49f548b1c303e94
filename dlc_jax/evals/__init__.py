"""What is measured and shown: arrays in, numbers and pictures out.

No module here builds a pipeline or imports another one.
"""

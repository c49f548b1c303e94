"""Weights of other programs, in and out, by tables of names.

PyTorch is needed for its own files alone, never for safetensors.
"""

"""Quantization schemes as checkpoints store them."""

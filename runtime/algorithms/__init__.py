"""Quantization algorithms: one file for each, pure functions of tensors."""

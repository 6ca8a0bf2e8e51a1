"""Decide branches of the model's code that depend on values."""

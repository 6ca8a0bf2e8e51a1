"""Symbolic sizes, and the conditions that a trace assumes about them."""

"""Determine how the stacked experts of a mixture split into one module for each matrix."""

"""Configs made small, for models of the same architecture that are built in a moment."""

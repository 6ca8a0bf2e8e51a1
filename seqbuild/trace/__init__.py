"""Trace a model's forward into a graph."""

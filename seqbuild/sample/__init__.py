"""Inputs made up for a model, from its signature and config."""

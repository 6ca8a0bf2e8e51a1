"""Shrink a config, so that a model of the same architecture can be built in seconds."""

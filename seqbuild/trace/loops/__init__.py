"""Record loops over a symbolic size as loops."""

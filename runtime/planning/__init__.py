"""Predict the memory, traffic and disk space of a calibration before it runs."""

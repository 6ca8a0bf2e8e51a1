"""The command line of the calibration host."""

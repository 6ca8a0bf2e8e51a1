"""The command line of the calibration host, and the parts that both command lines share."""

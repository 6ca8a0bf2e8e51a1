"""Pack, sign and tokenize what a calibration host needs."""

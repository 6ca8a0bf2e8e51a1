"""The cache of compiled artifacts."""

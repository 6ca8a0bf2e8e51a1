"""Verify that an artifact computes what its model computes."""

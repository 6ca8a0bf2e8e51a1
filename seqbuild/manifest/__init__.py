"""Describe a traced chain in the artifact's manifest."""

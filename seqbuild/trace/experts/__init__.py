"""Derive the computation of one expert from the class that contains all experts of a mixture."""

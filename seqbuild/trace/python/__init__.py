"""Make Python's own functions and literals traceable."""

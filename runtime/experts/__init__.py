"""Split stacked experts of a mixture into one module for each matrix of each expert."""

"""Learn what one expert of a mixture computes."""

"""The rooms behind the calibration loop: what is streamed in, kept between subgraphs, written, and remembered."""

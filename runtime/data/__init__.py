"""Calibration data: documents, conversations, token ids, and the batches and model inputs made from them."""

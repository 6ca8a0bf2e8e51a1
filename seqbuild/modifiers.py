"""Modifiers of a recipe, to create in Python; their names and fields are those of llm-compressor."""

from runtime.recipe.modifiers import AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier

__all__ = ["AWQModifier", "GPTQModifier", "QuantizationModifier", "SmoothQuantModifier"]

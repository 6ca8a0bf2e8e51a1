"""Numbers in words: durations, ratios and errors as pages show them."""

from __future__ import annotations

from runtime.console import human_bytes

NONE = "–"
_MOST_SECONDS, _LARGE = 1e9, 1e6  # larger numbers have an exponent


def size_text(count: int | None) -> str:
    """A size in decimal units, or a dash for none."""
    return human_bytes(count) if count else NONE


def bytes_text(num_bytes: int | None) -> str:
    """The size of a value."""
    return "depends on values" if num_bytes is None else size_text(num_bytes) if num_bytes else "0 B"


def seconds_text(seconds: float | None) -> str:
    """A duration: 0.8 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return NONE
    if seconds > _MOST_SECONDS:
        return f"{seconds:.3g} s"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min"


def error_text(error: float | None) -> str:
    """A relative error with four digits after the point, as on the screen."""
    if error is None:
        return "not finite"
    return f"{error:.4f}" if 1e-4 <= error < _LARGE or error == 0 else f"{error:.2e}"


def perplexity_text(perplexity: float | None) -> str:
    """A perplexity, with more digits if it is small."""
    if perplexity is None:
        return "not finite"
    if perplexity >= _LARGE:
        return f"{perplexity:.4g}"
    return f"{perplexity:.4f}" if perplexity < 100 else f"{perplexity:,.2f}"


def number_text(number: float | None) -> str:
    """A number with four digits."""
    return "not finite" if number is None else f"{number:.4g}"


def change_text(before: float, after: float) -> str:
    """A relative change in percent, with its sign."""
    if not before:
        return NONE
    change = after / before - 1
    return f"{change:+.2%}".replace("%", " %") if abs(change) < 10 else f"×{after / before:.4g}"


def count_text(number: int, noun: str, plural: str = "") -> str:
    """A number with a noun in singular or plural."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"

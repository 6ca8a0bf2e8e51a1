"""Encode the texts of requests as lm-eval's backend for transformers does: a continuation must get the same tokens.

A context and its continuation are encoded together, because tokens may span the border; the tokens of the continuation
are those after the tokens of the context alone. White space at the end of a context goes to the continuation, because
most tokenizers join it with the word that follows. Without a context, the prefix token takes its place: BOS, or EOS.

A long text is read in windows of `max_length` tokens, so that each token is predicted once, and the last window is
filled up with tokens before it. With 10 tokens and windows of 4:

    reads      prefix 1 2 3 | 4 5 6 7 | 6 7 8 9
    predicts        1 2 3 4 | 5 6 7 8 |     9 10
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import DataError, UsageError
from runtime.evaluation.requests import TokenRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048  # of a model whose config and tokenizer state none, as in lm-eval
_LONGEST = 10**9  # a tokenizer that states more has no limit


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """Encodes contexts and continuations.

    Attributes:
        tokenizer: of the model.
        max_length: the most tokens that the model reads at once.
        add_bos_token: whether texts begin with BOS; None for what the tokenizer does by default.
        stated_prefix: the token in place of a missing context; None for BOS, or EOS without BOS.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    add_bos_token: bool | None = None
    stated_prefix: int | None = None

    @property
    def prefix_token(self) -> int:
        """The token in place of a missing context.

        Raises:
            DataError: when the tokenizer has none.
        """
        tokenizer: Any = self.tokenizer
        for token in (self.stated_prefix, tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise DataError("the tokenizer has neither a BOS nor an EOS token", hint="pass --prefix-token-id")

    def encode(self, text: str, special_tokens: bool | None = None) -> tuple[int, ...]:
        """Return the tokens of a text.

        Args:
            text: a text that begins with the prefix token's own text gets no second one.
            special_tokens: whether the tokenizer may add BOS; None to decide as configured.
        """
        if special_tokens is None:
            special_tokens = self.add_bos_token
            begin = self.tokenizer.decode([self.prefix_token])
            if isinstance(begin, str) and text.startswith(begin):
                special_tokens = False
        chosen = {} if special_tokens is None else {"add_special_tokens": special_tokens}
        return tuple(self.tokenizer.encode(text, **chosen))

    def pair(self, context: str, continuation: str) -> TokenRequest:
        """Encode a context and its continuation."""
        if not context:
            tokens = self.encode(continuation, special_tokens=False)
            prefix = (self.prefix_token,)
            if tokens[:1] == prefix:
                return TokenRequest(prefix, tokens[1:])
            return TokenRequest(prefix, tokens)
        kept = context.rstrip()
        whole, before = self.encode(context + continuation), self.encode(kept)
        return TokenRequest(before or (self.prefix_token,), whole[len(before) :])

    def windows(self, text: str) -> Iterator[TokenRequest]:
        """Yield requests that predict each token of a text once."""
        tokens, longest = self.encode(text), self.max_length
        done = min(longest, len(tokens))
        if tokens:
            yield TokenRequest((self.prefix_token,), tokens[:done])
        while done < len(tokens):
            count = min(len(tokens) - done, longest)
            end = done + count
            yield TokenRequest(tokens[end - longest - 1 : done], tokens[done:end])
            done = end


def resolved_max_length(tokenizer: PreTrainedTokenizerBase, of_model: int | None, given: int | None) -> int:
    """The most tokens that the model reads at once.

    Args:
        tokenizer: of the model.
        of_model: the positions that the model's config states.
        given: by the user.

    Raises:
        UsageError: when the user gives more than the model has.
    """
    if given is not None:
        if of_model is not None and given > of_model:
            raise UsageError(f"--max-length {given} exceeds the model's {of_model} positions", hint="lower it")
        return given
    if of_model is not None:
        return of_model
    stated = getattr(tokenizer, "model_max_length", None)
    return int(stated) if stated is not None and stated < _LONGEST else DEFAULT_MAX_LENGTH

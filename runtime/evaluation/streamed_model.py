"""A model of lm-eval whose requests pass through the subgraphs together.

lm-eval asks a model for all answers of one kind at a time. This model computes the answers of all kinds and tasks when
it is asked first, if it knows the tasks, and remembers them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM

from runtime.evaluation.encoding import TextEncoder
from runtime.evaluation.requests import TokenRequest
from runtime.evaluation.scoring import Score
from runtime.evaluation.task_files import unsupported

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

PAIR, ROLLING = "loglikelihood", "loglikelihood_rolling"
Answers = Callable[[list[TokenRequest]], list[Score]]


class StreamedLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """Answers requests for log-likelihoods.

    Args:
        encoder: of texts.
        answers: computes the scores of requests.

    Attributes:
        tasks: whose requests are computed together; lm-eval has built them before it asks for the first answer.
    """

    def __init__(self, encoder: TextEncoder, answers: Answers) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer: Any = encoder.tokenizer
        self.answers = answers
        self.tasks: Sequence[Any] = ()
        self._known: dict[tuple[str, tuple[str, ...]], Any] = {}

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self.encoder.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found: int = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token in place of a missing context."""
        return self.encoder.prefix_token

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        return list(self.encoder.encode(string, add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt for a conversation; without its system message, if the template has no place for one."""
        import jinja2

        def applied(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        with contextlib.suppress(jinja2.exceptions.TemplateError):
            return applied(chat_history)
        return applied([message for message in chat_history if message["role"] != "system"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Return the log-likelihood of each continuation, and whether it is greedy."""
        return self._answered(PAIR, requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text."""
        return self._answered(ROLLING, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Reject the requests.

        Raises:
            UsageError: always.
        """
        raise unsupported(sorted({str(request.task_name) for request in requests}))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Score]:
        """Score requests that are encoded already."""
        return self.answers([TokenRequest(tuple(context), tuple(tokens)) for _, context, tokens in requests])

    def _answered(self, kind: str, requests: Iterable[Instance]) -> list[Any]:
        asked = [(kind, tuple(request.args)) for request in requests]
        instances = [one for task in self.tasks for one in task.instances]
        others = sorted({str(one.task_name) for one in instances if one.request_type not in (PAIR, ROLLING)})
        if others:  # of tasks written in Python
            raise unsupported(others)
        waiting = [(one.request_type, tuple(one.args)) for one in instances]
        new = [key for key in dict.fromkeys([*waiting, *asked]) if key not in self._known]
        if new:
            self._known.update(self._computed(new))
        for _, args in asked:
            self.cache_hook.add_partial(kind, args, self._known[kind, args])
        return [self._known[key] for key in asked]

    def _computed(self, keys: Sequence[tuple[str, tuple[str, ...]]]) -> Mapping[tuple[str, tuple[str, ...]], Any]:
        """Compute the answers to different requests with one pass."""
        parts: list[list[TokenRequest]] = []
        for kind, args in keys:
            parts.append([self.encoder.pair(*args)] if kind == PAIR else list(self.encoder.windows(*args)))
        scores = iter(self.answers([request for part in parts for request in part]))
        found: dict[tuple[str, tuple[str, ...]], Any] = {}
        for key, part in zip(keys, parts, strict=True):
            own = [next(scores) for _ in part]
            found[key] = own[0] if key[0] == PAIR else sum(score for score, _ in own)
        return found

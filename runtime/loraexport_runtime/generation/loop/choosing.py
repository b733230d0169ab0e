"""The next tokens of rows of which the graph alone does not tell them: from their logits."""

from collections.abc import Sequence

import numpy as np

from ...errors import InputError, NoNumberError, StepError
from ..handle import GeneratedToken, PromptToken
from ..sampling import draw, likeliest, log_shares
from ..steps.next_inputs import NO_TOKEN
from ..steps.runner import Runner
from .jobs import Answer, step_error

Chosen = GeneratedToken | InputError | StepError
"""Or why there is none: the others of the step have theirs."""


def take_likeliest(answer: Answer, token: int) -> Chosen:
    """The token that a step's graph gives."""
    return no_number() if token == NO_TOKEN else GeneratedToken(answer.index, token)


def choose(runner: Runner, rows: Sequence[tuple[int, Answer]]) -> list[Chosen]:
    """The token of each row after a step.

    A row that only draws from its likeliest tokens brings these to the host; of one that changes
    its logits, or is to tell probabilities, all of them come.
    """
    chosen: dict[int, Chosen] = {}
    narrow: list[tuple[int, Answer]] = []
    wide: list[tuple[int, Answer]] = []
    for row, answer in rows:
        needs_all = answer.sampler.changes_logits or answer.job.request.logprobs is not None
        num = answer.sampler.num_candidates(runner.vocabulary)
        few = not needs_all and num <= runner.most_candidates
        (narrow if few else wide).append((row, answer))
    if narrow:
        samplers = [answer.sampler for _, answer in narrow]
        most = max(sampler.num_candidates(runner.vocabulary) for sampler in samplers)
        values, tokens = runner.top(np.array([row for row, _ in narrow]), most)
        drawn = draw(samplers, values, tokens).tolist()
        for (row, answer), value, token in zip(narrow, values[:, 0], drawn, strict=True):
            told = GeneratedToken(answer.index, token)
            chosen[row] = no_number() if np.isnan(value) else told
    if wide:
        logits = runner.logits(np.array([row for row, _ in wide]))
        for (row, answer), of_row in zip(wide, logits, strict=True):
            chosen[row] = choose_from(answer, of_row)
    return [chosen[row] for row, _ in rows]


def choose_from(answer: Answer, logits: np.ndarray) -> Chosen:
    """An answer's token from all logits float32 [vocabulary]."""
    if np.isnan(logits).any():
        return no_number()
    try:
        token = answer.sampler.choose(logits)
    except InputError as error:  # it asks for what cannot be
        return error
    except Exception as error:  # of whoever computes its grammar
        return step_error(error)
    num = answer.job.request.logprobs
    if num is None:
        return GeneratedToken(answer.index, token)
    return GeneratedToken(answer.index, token, *logprobs(log_shares(logits), token, num))


def logprobs(
    shares: np.ndarray, token: int, num: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """That of a token, and the highest ones; shares: log probabilities [vocabulary]."""
    if num == 0:
        return float(shares[token]), ()
    values, tokens = likeliest(shares, num)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return float(shares[token]), tuple((int(one), float(value)) for one, value in pairs)


def prompt_tokens(answer: Answer, past: int, logits: np.ndarray) -> list[PromptToken]:
    """What the model thought of the tokens after those that were read, as far as there are any.

    Args:
        past: how many were read before.
        logits: float32 [n, vocabulary], after each token that was read now.
    """
    following = answer.job.prompt[past + 1 : past + 1 + len(logits)]
    num = answer.job.request.prompt_logprobs or 0
    return [
        PromptToken(token, *logprobs(shares, token, num))
        for token, shares in zip(
            following.tolist(), log_shares(logits[: len(following)]), strict=True
        )
    ]


def no_number() -> NoNumberError:
    """What whoever has got no number from the model is told."""
    return NoNumberError(
        "the model gave no number (NaN) for this request; its adapter overflows here, or the prompt"
        " does: export in bfloat16 or float32"
    )

"""What is done to logits before a token is chosen, in transformers' order and arithmetic (FP32).

Each function changes ``scores`` (R, V) float32 in place, for rows whose tokens so far are ``rows``. The
source followed is ``generation/logits_process.py`` of transformers 5.23 and, for the order,
``GenerationMixin._get_logits_processor``; every row is treated as transformers treats it alone,
without padding. Repetition penalty: Keskar et al. 2019, "CTRL"; nucleus (top-p) sampling: Holtzman et
al. 2020, "The Curious Case of Neural Text Degeneration".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.sequences import Sequences
from transom.runtime.generation.topk import topk_candidates

Scores = NDArray[np.float32]
Processor = Callable[[Scores, Sequences], None]
NEG_INF = np.float32(-np.inf)
NUCLEUS = 1024  # most likely tokens that a top-p without top-k is first looked for in


def processors(settings: GenerationConfig) -> list[Processor]:
    """The steps that ``settings`` ask for, in order: those on any way of choosing, then those on sampling."""
    eos = list(settings.eos_token_id)
    chain: list[Processor] = []
    if settings.repetition_penalty != 1.0:
        chain.append(partial(penalise_repetition, penalty=settings.repetition_penalty))
    if settings.no_repeat_ngram_size > 0:
        chain.append(partial(ban_repeated_ngrams, size=settings.no_repeat_ngram_size))
    words = [word for word in settings.bad_words_ids if word not in {(token,) for token in eos}]
    if words:
        chain.append(partial(ban_words, words=words))
    if eos and (settings.min_length > 0 or settings.min_new_tokens):
        chain.append(partial(hold_back_eos, eos=eos))
    if settings.forced_bos_token_id is not None:
        chain.append(partial(force_first, token=settings.forced_bos_token_id))
    if settings.forced_eos_token_id:
        chain.append(partial(force_last, tokens=list(settings.forced_eos_token_id)))
    if settings.suppress_tokens:
        chain.append(partial(suppress, tokens=list(settings.suppress_tokens)))
    if settings.begin_suppress_tokens:
        forced = settings.forced_bos_token_id is not None
        chain.append(partial(suppress_first, tokens=list(settings.begin_suppress_tokens), after_forced=forced))
    if settings.do_sample:
        # beams must keep more than the ends of sentences, or no beam could go on
        least = 1 if settings.num_beams == 1 else max(2, len(eos) + 1)
        if settings.temperature != 1.0:
            chain.append(partial(divide, temperature=settings.temperature))
        if settings.top_k > 0:
            chain.append(partial(keep_top_k, count=max(settings.top_k, least)))
        if settings.top_p < 1.0:
            chain.append(partial(keep_top_p, mass=settings.top_p, least=least))
    if settings.renormalize_logits:
        chain.append(renormalise)
    return chain


def processed(scores: Scores, rows: Sequences, chain: Sequence[Processor]) -> Scores:
    """``scores`` after the whole chain; a copy, or with an empty chain ``scores`` itself."""
    if chain:
        scores = scores.copy()
        for process in chain:
            process(scores, rows)
    return scores


def penalise_repetition(scores: Scores, rows: Sequences, *, penalty: float) -> None:
    """Tokens that the row already has, prompt included: positive scores divided, negative ones multiplied."""
    for row in range(len(rows)):
        seen = rows.sequence(row)
        score = scores[row, seen]
        scores[row, seen] = np.where(score < 0, score * np.float32(penalty), score / np.float32(penalty))


def ban_repeated_ngrams(scores: Scores, rows: Sequences, *, size: int) -> None:
    """Tokens that would complete ``size`` tokens in a row that the row already has, prompt included."""
    for row in range(len(rows)):
        tokens = rows.sequence(row)
        if len(tokens) >= size:
            windows = sliding_window_view(tokens, size)
            same = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(axis=1)
            scores[row, windows[same, -1]] = NEG_INF


def ban_words(scores: Scores, rows: Sequences, *, words: Sequence[tuple[int, ...]]) -> None:
    """The last token of each of ``words`` where the row ends with the tokens before it."""
    scores[:, [word[0] for word in words if len(word) == 1]] = NEG_INF
    longer = [word for word in words if len(word) > 1]
    for row in range(len(rows) if longer else 0):
        tail = tuple(rows.sequence(row)[-max(map(len, longer)) :].tolist())
        for word in longer:
            if tail[-(len(word) - 1) :] == word[:-1]:
                scores[row, word[-1]] = NEG_INF


def hold_back_eos(scores: Scores, rows: Sequences, *, eos: Sequence[int]) -> None:
    """No end of sequence in rows that are shorter than ``rows.shortest``: min_length, min_new_tokens."""
    short = np.flatnonzero(rows.lengths < rows.shortest)
    scores[short[:, None], list(eos)] = NEG_INF


def force_first(scores: Scores, rows: Sequences, *, token: int) -> None:
    """Rows of one token, as a decoder's start is: ``token`` comes next."""
    _force(scores, rows.lengths == 1, [token])


def force_last(scores: Scores, rows: Sequences, *, tokens: Sequence[int]) -> None:
    """Rows with room for one more token: it is one of ``tokens``, all with the score 0."""
    _force(scores, rows.lengths == rows.limits - 1, tokens)


def _force(scores: Scores, where: NDArray[np.bool_], tokens: Sequence[int]) -> None:
    for row in np.flatnonzero(where):
        scores[row] = NEG_INF
        scores[row, tokens] = 0


def suppress(scores: Scores, rows: Sequences, *, tokens: Sequence[int]) -> None:
    """``tokens`` are never chosen."""
    scores[:, tokens] = NEG_INF


def suppress_first(scores: Scores, rows: Sequences, *, tokens: Sequence[int], after_forced: bool) -> None:
    """``tokens`` are not the first new one, or not the second where the first is a forced one."""
    begin = rows.prompts + ((rows.prompts <= 1) & after_forced)
    first = np.flatnonzero(rows.lengths == begin)
    scores[first[:, None], list(tokens)] = NEG_INF


def divide(scores: Scores, rows: Sequences, *, temperature: float) -> None:
    """Below 1.0 the likely tokens become likelier, above it the unlikely ones."""
    np.divide(scores, np.float32(temperature), out=scores)


def keep_top_k(scores: Scores, rows: Sequences, *, count: int) -> None:
    """The ``count`` highest scores of each row, and all that equal the lowest of them."""
    for row in range(len(rows)):
        if count < scores.shape[1]:
            few = topk_candidates(scores[row], count)
            values = scores[row, few]
            keep = values >= np.partition(values, len(values) - count)[len(values) - count]
            scores[row] = NEG_INF
            scores[row, few[keep]] = values[keep]


def keep_top_p(scores: Scores, rows: Sequences, *, mass: float, least: int) -> None:
    """The fewest tokens of each row whose probabilities pass ``mass``, and no fewer than ``least``.

    Of equal scores those with the higher ids are kept first; transformers leaves that to torch.sort, which
    is not stable.
    """
    for row in range(len(rows)):
        tokens, values = unmasked(scores[row])
        if len(tokens) > least:
            keep = nucleus(values, mass, least)
            values = values[keep]
            scores[row] = NEG_INF
            scores[row, tokens[keep]] = values


def nucleus(scores: Scores, mass: float, least: int) -> NDArray[np.intp]:
    """Positions (K,) of the scores (N,), all finite, that a top-p of ``mass`` keeps.

    A token goes where its probability and all below it add up to at most 1 - mass. Sorting a whole
    vocabulary would cost more than all else, so the unlikely tokens are added up unsorted where they
    are light enough to go as a whole.
    """
    weights = np.exp(scores - scores.max())
    probabilities = weights / weights.sum()
    share = np.float32(1.0 - mass)
    for count in (NUCLEUS, 8 * NUCLEUS, len(scores)):
        few = topk_candidates(scores, count) if count < len(scores) else np.arange(len(scores))
        likely = probabilities[few]
        tail = float(probabilities.sum(dtype=np.float64) - likely.sum(dtype=np.float64))
        if len(few) == len(scores) or np.float32(tail) <= share:
            break
    values = scores[few]
    below = (tail + np.cumsum(np.sort(likely), dtype=np.float64)).astype(np.float32)
    kept = max(int((below > share).sum()), least)
    bound = np.partition(values, len(values) - kept)[len(values) - kept]
    above, equal = few[values > bound], few[values == bound]
    return np.concatenate([above, equal[len(equal) - (kept - len(above)) :]])


def unmasked(scores: Scores) -> tuple[NDArray[np.intp], Scores]:
    """Tokens (K,) that are not ruled out, in the scores (V,) of one row, and their scores."""
    may = scores > NEG_INF
    if may.all():
        return np.arange(len(scores)), scores.copy()
    tokens = np.flatnonzero(may)
    return tokens, scores[tokens]


def renormalise(scores: Scores, rows: Sequences) -> None:
    """Scores become natural logarithms of probabilities again."""
    scores[:] = log_softmax(scores)


def log_softmax(logits: Scores) -> Scores:
    """(R, V) -> (R, V), FP32 in the order of PyTorch's kernel: minus the maximum, minus the logarithm of the sum."""
    shifted: Scores = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted

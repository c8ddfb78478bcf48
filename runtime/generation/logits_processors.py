"""Logits processors: what changes the logits before a token is chosen, in transformers' order and arithmetic (FP32).

Each processor changes ``scores`` (R, V) float32 in place, for the R ``sequences`` so far. The
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
from transom.runtime.numeric import log_softmax, topk_candidates

Scores = NDArray[np.float32]
Processor = Callable[[Scores, Sequences], None]
NEG_INF = np.float32(-np.inf)
NUCLEUS = 1024  # most likely tokens that a top-p without top-k is first sought in


def logits_processors(config: GenerationConfig) -> list[Processor]:
    """Return the processors that ``config`` asks for, in order: those of every strategy, then those of sampling."""
    eos = list(config.eos_token_id)
    processors: list[Processor] = []
    if config.repetition_penalty != 1.0:
        processors.append(partial(penalise_repetition, penalty=config.repetition_penalty))
    if config.no_repeat_ngram_size > 0:
        processors.append(partial(ban_repeated_ngrams, size=config.no_repeat_ngram_size))
    words = [word for word in config.bad_words_ids if word not in {(token,) for token in eos}]
    if words:
        processors.append(partial(ban_words, words=words))
    if eos and (config.min_length > 0 or config.min_new_tokens):
        processors.append(partial(ban_early_eos, eos=eos))
    if config.forced_bos_token_id is not None:
        processors.append(partial(force_first, token=config.forced_bos_token_id))
    if config.forced_eos_token_id:
        processors.append(partial(force_last, tokens=list(config.forced_eos_token_id)))
    if config.suppress_tokens:
        processors.append(partial(suppress, tokens=list(config.suppress_tokens)))
    if config.begin_suppress_tokens:
        forced = config.forced_bos_token_id is not None
        processors.append(partial(suppress_at_begin, tokens=list(config.begin_suppress_tokens), after_forced=forced))
    if config.do_sample:
        # beams must keep more than the end-of-sequence tokens, or no beam could go on
        least = 1 if config.num_beams == 1 else max(2, len(eos) + 1)
        if config.temperature != 1.0:
            processors.append(partial(divide_by_temperature, temperature=config.temperature))
        if config.top_k > 0:
            processors.append(partial(keep_top_k, count=max(config.top_k, least)))
        if config.top_p < 1.0:
            processors.append(partial(keep_top_p, mass=config.top_p, least=least))
    if config.renormalize_logits:
        processors.append(renormalise)
    return processors


def process_logits(scores: Scores, sequences: Sequences, processors: Sequence[Processor]) -> Scores:
    """Return a copy of ``scores`` after all processors, or ``scores`` itself where there are none."""
    if processors:
        scores = scores.copy()
        for process in processors:
            process(scores, sequences)
    return scores


def penalise_repetition(scores: Scores, sequences: Sequences, *, penalty: float) -> None:
    """Divide the positive and multiply the negative scores of tokens that the row already has, prompt included."""
    for row in range(len(sequences)):
        seen = sequences.row(row)
        score = scores[row, seen]
        scores[row, seen] = np.where(score < 0, score * np.float32(penalty), score / np.float32(penalty))


def ban_repeated_ngrams(scores: Scores, sequences: Sequences, *, size: int) -> None:
    """Ban tokens that would complete an n-gram of ``size`` that the row already has, prompt included."""
    for row in range(len(sequences)):
        tokens = sequences.row(row)
        if len(tokens) >= size:
            windows = sliding_window_view(tokens, size)
            same = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(axis=1)
            scores[row, windows[same, -1]] = NEG_INF


def ban_words(scores: Scores, sequences: Sequences, *, words: Sequence[tuple[int, ...]]) -> None:
    """Ban the last token of each of ``words`` where the row ends with the tokens before it."""
    scores[:, [word[0] for word in words if len(word) == 1]] = NEG_INF
    longer = [word for word in words if len(word) > 1]
    for row in range(len(sequences) if longer else 0):
        tail = tuple(sequences.row(row)[-max(map(len, longer)) :].tolist())
        for word in longer:
            if tail[-(len(word) - 1) :] == word[:-1]:
                scores[row, word[-1]] = NEG_INF


def ban_early_eos(scores: Scores, sequences: Sequences, *, eos: Sequence[int]) -> None:
    """Ban end-of-sequence tokens in rows shorter than ``sequences.shortest``: min_length, min_new_tokens."""
    short = np.flatnonzero(sequences.lengths < sequences.shortest)
    scores[short[:, None], list(eos)] = NEG_INF


def force_first(scores: Scores, sequences: Sequences, *, token: int) -> None:
    """Force ``token`` after the first token of a row, as after a decoder's start."""
    _force(scores, sequences.lengths == 1, [token])


def force_last(scores: Scores, sequences: Sequences, *, tokens: Sequence[int]) -> None:
    """Force one of ``tokens``, all with the score 0, as the last token that a row's limit allows."""
    _force(scores, sequences.lengths == sequences.limits - 1, tokens)


def _force(scores: Scores, where: NDArray[np.bool_], tokens: Sequence[int]) -> None:
    for row in np.flatnonzero(where):
        scores[row] = NEG_INF
        scores[row, tokens] = 0


def suppress(scores: Scores, sequences: Sequences, *, tokens: Sequence[int]) -> None:
    """Ban ``tokens``."""
    scores[:, tokens] = NEG_INF


def suppress_at_begin(scores: Scores, sequences: Sequences, *, tokens: Sequence[int], after_forced: bool) -> None:
    """Ban ``tokens`` as the first new token, or as the second where the first is forced."""
    begin = sequences.prompts + ((sequences.prompts <= 1) & after_forced)
    first = np.flatnonzero(sequences.lengths == begin)
    scores[first[:, None], list(tokens)] = NEG_INF


def divide_by_temperature(scores: Scores, sequences: Sequences, *, temperature: float) -> None:
    """Divide by the temperature: below 1.0 likely tokens become likelier, above it unlikely ones do."""
    np.divide(scores, np.float32(temperature), out=scores)


def keep_top_k(scores: Scores, sequences: Sequences, *, count: int) -> None:
    """Keep the ``count`` highest scores of each row, and all that equal the lowest of them."""
    for row in range(len(sequences)):
        if count < scores.shape[1]:
            few = topk_candidates(scores[row], count)
            values = scores[row, few]
            keep = values >= np.partition(values, len(values) - count)[len(values) - count]
            scores[row] = NEG_INF
            scores[row, few[keep]] = values[keep]


def keep_top_p(scores: Scores, sequences: Sequences, *, mass: float, least: int) -> None:
    """Keep the fewest tokens of each row whose probabilities pass ``mass``, and no fewer than ``least``.

    Of equal scores those with the higher ids are kept first; transformers leaves that to torch.sort, which
    is not stable.
    """
    for row in range(len(sequences)):
        tokens, values = unmasked(scores[row])
        if len(tokens) > least:
            keep = nucleus(values, mass, least)
            values = values[keep]
            scores[row] = NEG_INF
            scores[row, tokens[keep]] = values


def nucleus(scores: Scores, mass: float, least: int) -> NDArray[np.intp]:
    """Return the positions (K,) of the scores (N,), all finite, that a top-p of ``mass`` keeps.

    A token is dropped where its probability and all below it add up to at most 1 - mass. Sorting a whole
    vocabulary would cost more than all else, so the unlikely tokens are added up unsorted where their
    sum is small enough to drop them as a whole.
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
    """Return the tokens (K,) whose scores are above -inf, of the scores (V,) of one row, and those scores."""
    possible = scores > NEG_INF
    if possible.all():
        return np.arange(len(scores)), scores.copy()
    tokens = np.flatnonzero(possible)
    return tokens, scores[tokens]


def renormalise(scores: Scores, sequences: Sequences) -> None:
    """Turn scores into natural logarithms of probabilities again."""
    scores[:] = log_softmax(scores)

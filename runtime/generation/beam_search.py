"""Beam search, equal to transformers'.

The source followed is ``GenerationMixin._beam_search`` of transformers 5.23 and its helpers, with its
FP32 arithmetic and its numbers: -1e9 marks what must not be chosen. Each prompt is searched as if it
were alone, and leaves the batch when it is done. Of equal scores the first candidate goes first;
transformers leaves that to torch.topk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.logits_processors import log_softmax, processed, processors
from transom.runtime.generation.sampling import check_choice, check_logits, row_rngs
from transom.runtime.generation.sequences import DecoderProtocol, Sequences, reorder
from transom.runtime.generation.stopping import StoppingCriteria
from transom.runtime.generation.topk import topk

MASKED_SCORE = np.float32(-1.0e9)  # far below any sum of logarithms of probabilities


class BeamHypotheses:
    """The beams of one prompt: K that go on, and the K best that are finished.

    running   (K,) FP32 sums of log probabilities, highest first; at the start only beam 0 counts
    scores    (K,) FP32 sums of the finished, divided by a power of their length, highest first
    finished  K lists of new tokens; empty where ``complete`` (K,) says that there is none yet
    """

    def __init__(self, settings: GenerationConfig, limit: int) -> None:
        self.settings = settings
        self.limit = limit  # new tokens
        beams = settings.num_beams
        self.running = np.full(beams, MASKED_SCORE, dtype=np.float32)
        self.running[0] = 0
        self.scores = np.full(beams, MASKED_SCORE, dtype=np.float32)
        self.finished: list[list[int]] = [[] for _ in range(beams)]
        self.complete = np.zeros(beams, dtype=np.bool_)

    def candidates(
        self, log_probabilities: NDArray[np.float32], stream: np.random.Generator | None
    ) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.int64]]:
        """Score, beam and token of the continuations (C,) to look at, best first; those of (K, V).

        With a stream they are drawn without replacement, in the order drawn: the highest of the log
        probabilities plus Gumbel noise (Kool et al. 2019, "Stochastic Beams and Where to Find Them").
        """
        sums = (log_probabilities + self.running[:, None]).reshape(-1)
        keys = sums
        if stream is not None:
            keys, may = sums.copy(), np.flatnonzero(sums > -np.inf)
            keys[may] += stream.gumbel(size=len(may)).astype(np.float32)
        best = topk(keys, self.settings.candidates)
        return sums[best], best // log_probabilities.shape[1], best % log_probabilities.shape[1]

    def go_on(self, scores: NDArray[np.float32], ended: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Choose from the candidates (C,) the K beams to go on with; returns their positions."""
        rest = scores + ended.astype(np.float32) * MASKED_SCORE
        chosen = topk(rest, self.settings.num_beams)
        self.running = rest[chosen]
        return chosen

    def collect(self, scores: NDArray[np.float32], ended: NDArray[np.bool_], rows: list[list[int]]) -> None:
        """Put into the K best those of the candidates' rows that have just ended, if the first K candidates have."""
        beams = self.settings.num_beams
        counts = ended & (np.arange(len(ended)) < beams)
        scores = per_length(scores, len(rows[0]), self.settings.length_penalty)
        scores = scores + (~counts).astype(np.float32) * MASKED_SCORE
        merged, complete = np.concatenate([self.scores, scores]), np.concatenate([self.complete, counts])
        best = np.lexsort((~complete, -merged))[:beams]  # of equal ones those that are rows at all
        self.finished = [self.finished[k] if k < beams else rows[k - beams] for k in best]
        self.scores = merged[best]
        self.complete = complete[best]

    def is_over(self, ended: NDArray[np.bool_], length: int) -> bool:
        """Whether nothing better can come after ``length`` new tokens; ``ended`` says which candidates have."""
        early, penalty = self.settings.early_stopping, self.settings.length_penalty
        longest = self.limit if early == "never" and penalty > 0.0 else length
        hope = per_length(self.running[:1], longest, penalty)
        worst = np.where(self.complete, self.scores.min(), MASKED_SCORE)
        full = bool(self.complete.all()) and early is True
        return full or not bool((hope > worst).any()) or bool(ended.all())


def per_length(sums: NDArray[np.float32], length: int, penalty: float) -> NDArray[np.float32]:
    """Sums of log probabilities (N,) over a power of the length, which may pass FP32's range as in PyTorch."""
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        return sums / np.float32(length**penalty)


def beam_search(
    rows: Sequences,
    logits: NDArray[np.float32],
    continuation: DecoderProtocol,
    settings: GenerationConfig,
    stopping: StoppingCriteria,
    first: int = 0,
) -> list[list[int]]:
    """New tokens of the ``num_return_sequences`` best rows of each prompt, in the prompts' order.

    ``rows`` are the R prompts, ``logits`` (R, V) what follows each, ``first`` the number of the first.
    The continuation's rows become the beams of the prompts still searched, prompt after prompt.
    """
    beams, chain = settings.num_beams, processors(settings)
    searches = [BeamHypotheses(settings, int(limit)) for limit in rows.limits - rows.prompts]
    numbers = np.repeat(first + np.arange(len(rows)), settings.num_return_sequences)
    streams = row_rngs(settings, numbers) if settings.do_sample else []
    live = list(range(len(rows)))
    held = len(rows)  # rows of the continuation
    at = np.repeat(np.arange(held), beams)  # of each beam, its row there
    rows.select(at)
    step = 1
    while True:
        check_logits(logits, first + np.repeat(live, len(logits) // len(live)), step)
        log_probabilities = log_softmax(logits)
        if len(logits) < len(rows):  # the beams of the first step are still one row
            log_probabilities = log_probabilities[at]
        log_probabilities = processed(log_probabilities, rows, chain)
        parents, tokens, stay = [], [], []
        for place, prompt in enumerate(live):
            search, own = searches[prompt], slice(place * beams, (place + 1) * beams)
            stream = streams[prompt * settings.num_return_sequences] if settings.do_sample else None
            scores, beam, token = search.candidates(log_probabilities[own], stream)
            check_choice(scores[:1], np.array([first + prompt]), step)
            ended = stopping.ends(token) | (step >= search.limit)
            for k in np.flatnonzero(~ended).tolist() if stopping.strings else ():
                ended[k] = stopping.completes(rows.sequence(own.start + beam[k]), int(token[k]))
            chosen = search.go_on(scores, ended)
            if ended[:beams].any():
                new = [[*rows.new(own.start + row), int(last)] for row, last in zip(beam, token, strict=True)]
                search.collect(scores, ended, new)
            if not search.is_over(ended, step):
                stay.append(prompt)
                parents.append(own.start + beam[chosen])
                tokens.append(token[chosen])
        if not stay:
            best = [search.finished[: settings.num_return_sequences] for search in searches]
            return [row for finished in best for row in finished]
        live, chosen_rows, fed = stay, np.concatenate(parents), np.concatenate(tokens)
        rows.select(chosen_rows)
        rows.append(fed)
        reorder(continuation, at[chosen_rows], held)
        held, at = len(chosen_rows), np.arange(len(chosen_rows))
        logits = continuation.decode_step(fed)
        step += 1

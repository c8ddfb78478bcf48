"""Beam search, equal to transformers'.

The source followed is ``GenerationMixin._beam_search`` of transformers 5.23 and its helpers, with its
FP32 arithmetic and its numbers: -1e9 marks what must not be chosen. Each prompt is searched as if it
were alone, and leaves the batch when it is finished. Of equal scores the first candidate comes first;
transformers leaves that to torch.topk.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.logits_processors import logits_processors, process_logits
from transom.runtime.generation.sampling import check_choice, check_logits, row_rngs
from transom.runtime.generation.sequences import DecoderProtocol, Sequences
from transom.runtime.generation.stopping_criteria import StoppingCriteria
from transom.runtime.numeric import log_normalisers, log_softmax, topk, topk_candidates

MASKED_SCORE = -1.0e9  # a number of FP32, far below any sum of log probabilities


class BeamHypotheses:
    """The hypotheses of one prompt: K running beams, and the K best that are finished.

    running   K sums of log probabilities, highest first; at the start only beam 0 counts
    scores    K sums of the finished, divided by a power of their length, highest first
    finished  K lists of new tokens; empty where ``complete`` is False: none has finished there yet

    All are numbers of FP32, added and compared as such, in plain floats: behind a large graph the interpreter's code
    for a few of them is back in the processor's caches sooner than numpy's.
    """

    def __init__(self, config: GenerationConfig, limit: int) -> None:
        self.config = config
        self.limit = limit  # new tokens
        beams = config.num_beams
        self.running = [0.0] + [MASKED_SCORE] * (beams - 1)
        self.scores = [MASKED_SCORE] * beams
        self.finished: list[list[int]] = [[] for _ in range(beams)]
        self.complete = [False] * beams

    def candidates(
        self, log_probabilities: NDArray[np.float32], rng: np.random.Generator | None
    ) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.int64]]:
        """Return score, beam and token of the best continuations (C,) of the beams' (K, V), best first.

        With a random generator they are drawn without replacement, in the order drawn: the highest of the log
        probabilities plus Gumbel noise (Kool et al. 2019, "Stochastic Beams and Where to Find Them").
        """
        sums = (log_probabilities + np.array(self.running, np.float32)[:, None]).reshape(-1)
        keys = sums
        if rng is not None:
            keys, possible = sums.copy(), np.flatnonzero(sums > -np.inf)
            keys[possible] += rng.gumbel(size=len(possible)).astype(np.float32)
        best = topk(keys, self.config.candidates)
        return sums[best], best // log_probabilities.shape[1], best % log_probabilities.shape[1]

    def candidates_of_logits(
        self,
        logits: NDArray[np.float32],
        highest: NDArray[np.float32],
        normalisers: NDArray[np.float32],
        rows: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.int64]]:
        """Return what ``candidates`` does, bit for bit, for beams whose logits are ``rows`` of ``logits`` (R, V).

        ``highest`` (R,) are the rows' maxima, ``normalisers`` (R,) the logarithms of their sums of exponentials. The
        log-softmax is computed of a few logits alone: their order is that of the sums but where rounding makes sums
        equal, of which the first wins, and logits that close are among the few.
        """
        count = self.config.candidates
        scores, tokens = [], []
        for row, running in zip(rows, self.running, strict=True):
            values, high, normaliser = logits[row], highest[row], normalisers[row]
            few = topk_candidates(values, count, 2 * abs(float(high)) + float(normaliser) + abs(running))
            scores.append(((values[few] - high) - normaliser) + np.float32(running))
            tokens.append(few)
        sums, beams = np.concatenate(scores), np.repeat(np.arange(len(tokens)), [len(few) for few in tokens])
        best = np.argsort(-sums, kind="stable")[:count]
        return sums[best], beams[best], np.concatenate(tokens)[best]

    def continue_with(self, scores: Sequence[float], ended: Sequence[bool]) -> list[int]:
        """Choose the K running beams among the C candidates; return their positions there."""
        running = list(scores)
        for k, end in enumerate(ended):
            if end:
                running[k] = float(np.float32(running[k] + MASKED_SCORE))
        chosen = sorted(range(len(running)), key=running.__getitem__, reverse=True)[: self.config.num_beams]
        self.running = [running[k] for k in chosen]
        return chosen

    def add_finished(self, scores: Sequence[float], ended: Sequence[bool], rows: Sequence[list[int]]) -> None:
        """Merge the candidates' rows that have just ended, among the first K candidates, into the K best finished."""
        beams = self.config.num_beams
        counts = np.array(ended) & (np.arange(len(ended)) < beams)
        new = penalised_by_length(np.array(scores, np.float32), len(rows[0]), self.config.length_penalty)
        new = new + (~counts).astype(np.float32) * np.float32(MASKED_SCORE)
        merged, complete = np.array([*self.scores, *new.tolist()], np.float32), np.array([*self.complete, *counts])
        best = np.lexsort((~complete, -merged))[:beams]  # of equal ones those that are complete
        self.finished = [self.finished[k] if k < beams else rows[k - beams] for k in best]
        self.scores = merged[best].tolist()
        self.complete = complete[best].tolist()

    def is_done(self, ended: Sequence[bool], length: int) -> bool:
        """Return whether nothing better can follow ``length`` new tokens, where the candidates ``ended`` have."""
        early, penalty = self.config.early_stopping, self.config.length_penalty
        if all(ended):
            return True
        if all(self.complete):
            if early is True:
                return True
        elif penalty >= 0.0 and MASKED_SCORE < self.running[0] <= 0.0:
            return False  # divided by 1 or more it is above the score of those that are not complete
        longest = self.limit if early == "never" and penalty > 0.0 else length
        best = float(penalised_by_length(np.array(self.running[:1], np.float32), longest, penalty)[0])
        worst = min(self.scores)
        return not any(best > (worst if complete else MASKED_SCORE) for complete in self.complete)


def penalised_by_length(sums: NDArray[np.float32], length: int, penalty: float) -> NDArray[np.float32]:
    """Divide sums of log probabilities (N,) by a power of the length, which may pass FP32's range as in PyTorch."""
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        return sums / np.float32(length**penalty)


def beam_search(
    sequences: Sequences,
    logits: NDArray[np.float32],
    decoder: DecoderProtocol,
    config: GenerationConfig,
    stopping: StoppingCriteria,
    numbers: NDArray[np.intp],
) -> list[list[int]]:
    """Return the new tokens of the ``num_return_sequences`` best rows of each prompt, in the prompts' order.

    ``sequences`` are the R prompts, ``logits`` (R, V) those of the next token, ``numbers`` (R,) the prompts' in the
    caller's list. The decoder's rows become the beams of the unfinished prompts, prompt after prompt; those of one
    prompt in any order, ``places`` says which is where, so that a beam that goes on stays where it is. ``sequences``
    follow where anything reads them.
    """
    beams, processors = config.num_beams, logits_processors(config)
    hypotheses = [BeamHypotheses(config, limit) for limit in (sequences.limits - sequences.prompts).tolist()]
    rngs = row_rngs(config, np.repeat(numbers, config.num_return_sequences)) if config.do_sample else []
    live = list(range(len(sequences)))
    places = [list(range(beams)) for _ in live]  # of each live prompt's beams, best first, among its rows
    beam_rows = [row for row in live for _ in range(beams)]  # of each beam, its row in the decoder
    written: list[list[int]] = [[] for _ in beam_rows]  # each beam's new tokens
    sequences.reorder(np.array(beam_rows))
    work = np.empty((0, 0), np.float32)
    step = 0
    while True:
        step += 1
        highest = logits.max(axis=1)
        if not all(map(isfinite, highest.tolist())):
            check_logits(highest[:, None], np.repeat(numbers[live], len(logits) // len(live)), step)
        few = len(logits) == len(written) and not processors and not config.do_sample
        if few:
            work = work if len(work) >= len(logits) else np.empty_like(logits)
            normalisers = log_normalisers(logits, highest, work)
        else:
            log_probabilities = log_softmax(logits)
            if len(logits) < len(written):  # the beams of the first step are still one row
                log_probabilities = log_probabilities[beam_rows]
            log_probabilities = process_logits(log_probabilities, sequences, processors)
        parents, tokens, left, left_places = [], [], [], []
        for block, (prompt, place) in enumerate(zip(live, places, strict=True)):
            search, rows = hypotheses[prompt], [block * beams + row for row in place]
            if few:
                found = search.candidates_of_logits(logits, highest, normalisers, rows)
            else:
                rng = rngs[prompt * config.num_return_sequences] if config.do_sample else None
                found = search.candidates(log_probabilities[rows], rng)
            scores, beam, token = (part.tolist() for part in found)
            if scores[0] == -inf:
                check_choice(found[0][:1], numbers[[prompt]], step)
            ended = [each in stopping.eos or step >= search.limit for each in token]
            if stopping.strings:
                for k, (parent, last) in enumerate(zip(beam, token, strict=True)):
                    ended[k] = ended[k] or stopping.completes_stop_string(sequences.row(rows[parent]), last)
            chosen = search.continue_with(scores, ended)
            if True in ended[:beams]:
                new = [[*written[rows[parent]], last] for parent, last in zip(beam, token, strict=True)]
                search.add_finished(scores, ended, new)
            if not search.is_done(ended, step):
                left.append(prompt)
                sources, where = kept_in_place([place[beam[k]] for k in chosen])
                left_places.append(where)
                parents += [block * beams + source for source in sources]
                by_row = dict(zip(where, chosen, strict=True))
                tokens += [token[by_row[row]] for row in range(beams)]
        if not left:
            best = [search.finished[: config.num_return_sequences] for search in hypotheses]
            return [row for finished in best for row in finished]
        live, places, next_tokens = left, left_places, np.array(tokens)
        written = [written[parent] if parent == row else written[parent].copy() for row, parent in enumerate(parents)]
        for text, last in zip(written, tokens, strict=True):
            text.append(last)
        if processors or stopping.strings:
            sequences.reorder(np.array(parents))
            sequences.append(next_tokens)
        decoder_rows = [beam_rows[parent] for parent in parents]
        beam_rows = list(range(len(parents)))
        if decoder_rows != beam_rows or len(logits) != len(beam_rows):
            decoder.reorder(np.array(decoder_rows))
        logits = decoder.decode_step(next_tokens)


def kept_in_place(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return which of K rows each of K rows is made of, and where the K children of ``parents`` are then.

    The first child of a parent stays in its row; the others take the rows of those that have none.
    """
    free = [row for row in range(len(parents)) if row not in parents]
    sources, where = list(range(len(parents))), []
    for child, parent in enumerate(parents):
        if parent in parents[:child]:
            where.append(free.pop())
            sources[where[-1]] = parent
        else:
            where.append(parent)
    return sources, where

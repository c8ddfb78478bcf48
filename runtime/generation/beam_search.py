"""Beam search, equal to transformers'.

The source followed is ``GenerationMixin._beam_search`` of transformers 5.23 and its helpers, with its
FP32 arithmetic and its numbers: -1e9 marks what must not be chosen. Each prompt is searched as if it
were alone, and leaves the batch when it is finished. Of equal scores the first candidate comes first;
transformers leaves that to torch.topk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.logits_processors import logits_processors, process_logits
from transom.runtime.generation.sampling import check_choice, check_logits, row_rngs
from transom.runtime.generation.sequences import DecoderProtocol, Sequences, reorder_decoder
from transom.runtime.generation.stopping_criteria import StoppingCriteria
from transom.runtime.numeric import log_normalisers, log_softmax, topk, topk_candidates

MASKED_SCORE = np.float32(-1.0e9)  # far below any sum of log probabilities


class BeamHypotheses:
    """The hypotheses of one prompt: K running beams, and the K best that are finished.

    running   (K,) FP32 sums of log probabilities, highest first; at the start only beam 0 counts
    scores    (K,) FP32 sums of the finished, divided by a power of their length, highest first
    finished  K lists of new tokens; empty where ``complete`` (K,) is False: none has finished there yet
    """

    def __init__(self, config: GenerationConfig, limit: int) -> None:
        self.config = config
        self.limit = limit  # new tokens
        beams = config.num_beams
        self.running = np.full(beams, MASKED_SCORE, dtype=np.float32)
        self.running[0] = 0
        self.scores = np.full(beams, MASKED_SCORE, dtype=np.float32)
        self.finished: list[list[int]] = [[] for _ in range(beams)]
        self.complete = np.zeros(beams, dtype=np.bool_)

    def candidates(
        self, log_probabilities: NDArray[np.float32], rng: np.random.Generator | None
    ) -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.int64]]:
        """Return score, beam and token of the best continuations (C,) of the beams' (K, V), best first.

        With a random generator they are drawn without replacement, in the order drawn: the highest of the log
        probabilities plus Gumbel noise (Kool et al. 2019, "Stochastic Beams and Where to Find Them").
        """
        sums = (log_probabilities + self.running[:, None]).reshape(-1)
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
            few = topk_candidates(values, count, 2 * abs(float(high)) + float(normaliser) + abs(float(running)))
            scores.append(((values[few] - high) - normaliser) + running)
            tokens.append(few)
        sums, beams = np.concatenate(scores), np.repeat(np.arange(len(tokens)), [len(few) for few in tokens])
        best = np.argsort(-sums, kind="stable")[:count]
        return sums[best], beams[best], np.concatenate(tokens)[best]

    def continue_with(self, scores: NDArray[np.float32], ended: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Choose the K running beams among the candidates (C,); return their positions there."""
        running = scores + ended.astype(np.float32) * MASKED_SCORE
        chosen = topk(running, self.config.num_beams)
        self.running = running[chosen]
        return chosen

    def add_finished(self, scores: NDArray[np.float32], ended: NDArray[np.bool_], rows: list[list[int]]) -> None:
        """Merge the candidates' rows that have just ended, among the first K candidates, into the K best finished."""
        beams = self.config.num_beams
        counts = ended & (np.arange(len(ended)) < beams)
        scores = penalised_by_length(scores, len(rows[0]), self.config.length_penalty)
        scores = scores + (~counts).astype(np.float32) * MASKED_SCORE
        merged, complete = np.concatenate([self.scores, scores]), np.concatenate([self.complete, counts])
        best = np.lexsort((~complete, -merged))[:beams]  # of equal ones those that are complete
        self.finished = [self.finished[k] if k < beams else rows[k - beams] for k in best]
        self.scores = merged[best]
        self.complete = complete[best]

    def is_done(self, ended: NDArray[np.bool_], length: int) -> bool:
        """Return whether nothing better can follow ``length`` new tokens, where the candidates ``ended`` (C,) have."""
        early, penalty = self.config.early_stopping, self.config.length_penalty
        longest = self.limit if early == "never" and penalty > 0.0 else length
        best_running = penalised_by_length(self.running[:1], longest, penalty)
        worst = np.where(self.complete, self.scores.min(), MASKED_SCORE)
        full = bool(self.complete.all()) and early is True
        return full or not bool((best_running > worst).any()) or bool(ended.all())


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
    prompt in any order, ``places`` says which is where, so that a beam that goes on stays where it is.
    """
    beams, processors = config.num_beams, logits_processors(config)
    hypotheses = [BeamHypotheses(config, int(limit)) for limit in sequences.limits - sequences.prompts]
    names = numbers  # of each row of the logits, its prompt's number
    rngs = row_rngs(config, np.repeat(numbers, config.num_return_sequences)) if config.do_sample else []
    live = list(range(len(sequences)))
    places = [np.arange(beams) for _ in live]  # of each live prompt's beams, best first, among its rows
    decoder_rows = len(sequences)
    beam_rows = np.repeat(np.arange(decoder_rows), beams)  # of each beam, its row in the decoder
    sequences.reorder(beam_rows)
    work = np.empty((0, 0), np.float32)
    step = 1
    while True:
        highest = logits.max(axis=1)
        check_logits(highest[:, None], names, step)
        few = len(logits) == len(sequences) and not processors and not config.do_sample
        if few:
            work = work if len(work) >= len(logits) else np.empty_like(logits)
            normalisers = log_normalisers(logits, highest, work)
        else:
            log_probabilities = log_softmax(logits)
            if len(logits) < len(sequences):  # the beams of the first step are still one row
                log_probabilities = log_probabilities[beam_rows]
            log_probabilities = process_logits(log_probabilities, sequences, processors)
        parents, tokens, left, left_places = [], [], [], []
        for block, (prompt, place) in enumerate(zip(live, places, strict=True)):
            search, rows = hypotheses[prompt], block * beams + place
            if few:
                scores, beam, token = search.candidates_of_logits(logits, highest, normalisers, rows.tolist())
            else:
                rng = rngs[prompt * config.num_return_sequences] if config.do_sample else None
                scores, beam, token = search.candidates(log_probabilities[rows], rng)
            check_choice(scores[:1], numbers[[prompt]], step)
            ended = stopping.is_eos(token) | (step >= search.limit)
            for k in np.flatnonzero(~ended).tolist() if stopping.strings else ():
                ended[k] = stopping.completes_stop_string(sequences.row(rows[beam[k]]), int(token[k]))
            chosen = search.continue_with(scores, ended)
            if ended[:beams].any():
                new = [[*sequences.new_tokens(rows[b]), int(last)] for b, last in zip(beam, token, strict=True)]
                search.add_finished(scores, ended, new)
            if not search.is_done(ended, step):
                left.append(prompt)
                sources, where = kept_in_place(place[beam[chosen]])
                left_places.append(where)
                parents.append(block * beams + sources)
                tokens.append(np.empty_like(token, shape=beams))
                tokens[-1][where] = token[chosen]
        if not left:
            best = [search.finished[: config.num_return_sequences] for search in hypotheses]
            return [row for finished in best for row in finished]
        live, places, names = left, left_places, np.repeat(numbers[left], beams)
        chosen_rows, next_tokens = np.concatenate(parents), np.concatenate(tokens)
        sequences.reorder(chosen_rows)
        sequences.append(next_tokens)
        reorder_decoder(decoder, beam_rows[chosen_rows], decoder_rows)
        decoder_rows, beam_rows = len(chosen_rows), np.arange(len(chosen_rows))
        logits = decoder.decode_step(next_tokens)
        step += 1


def kept_in_place(parents: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which of K rows each of K rows is made of, and where the children (K,) of ``parents`` (K,) are then.

    The first child of a parent stays in its row; the others take the rows of those that have none.
    """
    found = parents.tolist()
    free = [row for row in range(len(found)) if row not in found]
    sources, where = list(range(len(found))), []
    for child, parent in enumerate(found):
        if parent in found[:child]:
            where.append(free.pop())
            sources[where[-1]] = parent
        else:
            where.append(parent)
    return np.array(sources), np.array(where)

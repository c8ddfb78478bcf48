"""Tasks of decoder-only models: continue prompts, and score texts by their perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from transom.runtime.decoder import CHUNK
from transom.runtime.errors import InputError
from transom.runtime.feeds import LOGITS_POSITIONS, WRITE_INDICES
from transom.runtime.finite import check_finite
from transom.runtime.numeric import token_log_probabilities
from transom.runtime.tasks.generator import Generator, PrefillResult
from transom.runtime.tasks.generator_task import ask_generator, generated_lines, prompt_of
from transom.runtime.tasks.prompts import Row, padded
from transom.runtime.tasks.task import FamilyTasks, Task


class GPT(Generator):
    """A loaded decoder-only model: ``generate``, ``stream``, ``score``, ``log_probabilities``."""

    GRAPHS: ClassVar = {"decoder": ("input_ids", WRITE_INDICES, LOGITS_POSITIONS)}

    def prefill(self, prompts: Sequence[Row]) -> PrefillResult:
        decoder = self.new_decoder(len(prompts))
        logits = decoder.prefill(*padded(prompts))
        return PrefillResult(decoder, [list(row) for row in prompts], logits)

    def decoder_length(self, prompt: Sequence[Any]) -> int:
        return len(prompt)

    def score(self, text: Any) -> Any:
        """Return the perplexity of a text, or of a list of ids: exp of the mean negative log-probability per token.

        As transformers' loss, over every token but the first. A list of texts gets a list.
        """
        prompts = self._prompt_reader.read(text)
        found = [
            perplexity(self._log_probabilities(row, prompts.name(place)))
            for place in range(len(prompts.given))
            for row in self._token_reader().rows(prompts, [place])
        ]
        return found[0] if prompts.single else found

    def log_probabilities(self, text: Any) -> NDArray[np.float64]:
        """Return the log-probability (natural) of each token but the first, given those before it: (tokens - 1,).

        A text longer than the context is read in windows that overlap by half of it; each token is then
        conditioned on at least half a context. Raises NotFiniteError, as ``score`` does.
        """
        prompts = self._prompt_reader.read(text)
        if not prompts.single:
            raise InputError(f"log_probabilities takes one text, received {len(prompts.given)}; call it once for each.")
        return self._log_probabilities(self._token_reader().rows(prompts, [0])[0], prompts.name(0))

    def _log_probabilities(self, row: Row, name: str) -> NDArray[np.float64]:
        if len(row) < 2:
            raise InputError("a text of one token has no token that could be predicted; give a longer one.")
        ids = np.array(row)
        found = np.empty(len(ids) - 1)
        known = 0  # tokens whose successor is scored
        stride = max(self.context // 2, 1)
        for first in range(0, len(ids), stride):
            window = ids[first : first + self.context]
            following = ids[first + 1 : first + len(window) + 1]
            scored = self._window(window, following, skip=known - first, name=name)
            found[known : known + len(scored)] = scored
            known += len(scored)
            if known == len(found):
                break
        return found

    def _window(
        self, window: NDArray[np.int64], following: NDArray[np.int64], skip: int, name: str
    ) -> NDArray[np.float64]:
        """Return the log-probability of each of ``following`` after its token of ``window``, from ``skip`` on."""
        decoder = self.new_decoder(1)
        parts = []
        for first in range(0, len(following), CHUNK):
            targets = following[first : first + CHUNK]
            logits = decoder.forward_logits(window[None, first : first + CHUNK])[0, : len(targets)]
            check_finite(logits, "logits", lambda _: name, ruled_out=True)
            parts.append(token_log_probabilities(logits, targets))
        return np.concatenate(parts)[skip:]


def perplexity(log_probabilities: NDArray[np.float64]) -> float:
    """Return exp of the mean negative log-probability; infinite past float64's range, as for a token ruled out."""
    with np.errstate(over="ignore"):
        return float(np.exp(-log_probabilities.mean()))


FAMILY = FamilyTasks(
    GPT,
    {
        "text-generation": Task(
            ask_generator,
            generated_lines,
            generates=True,
            prompt=prompt_of,
            scores=True,
            example="'It is a truth universally acknowledged'",
        ),
    },
)

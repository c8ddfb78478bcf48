"""Trains the reference Flamingo to answer questions about images of digits, and writes its checkpoint folder.

    python examples/train_flamingo_digits.py --out DIR      tokenizer, weights, image processor, scores
    python examples/train_flamingo_digits.py --dev          scored on a fifth of the training scans; the held-out ones
                                                            stay untouched

The model is transom.models.flamingo, the paper's. Stage 1 (flamingo_vision.py) trains a ViT on the images, stage 2
(flamingo_language.py) a GPT on the texts; both are rounded to FP16, as they ship, and frozen. Stage 3, here, learns
what joins them: the resampler and the gated cross-attention, whose gates begin at zero. One thread, a seed per stage.

With --stages DIR the first two stages are kept there, and read from there where they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from digit_dialogues import Batch, Batches, make_tokenizer
from digit_questions import Digits, composed, held_out, training_scans
from flamingo_answers import report
from flamingo_checkpoint import digest, flamingo_config, save
from flamingo_language import initial, text_config, train_language, weighted_loss
from flamingo_vision import Reader, draw, train_vision
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_vit_digits import scans, split
from training_schedules import Updates

from transom.export.datasets import heldout_questions, question_examples
from transom.models.flamingo import Flamingo

SEED = 22
STEPS, ROWS, WARMUP = 3000, 48, 60
TALKS = 0.15  # of the dialogues
GATES_LR = 0.02  # they begin at zero, and nothing else is learned until they open
POOL, DRAWN = 16_000, 64  # images of stage 3, whose features are computed once; so many at a time
FROZEN = ("vision_model", "language_model")


class Pool:
    """Images of jittered scans, and what the frozen ViT makes of them: FP16 (POOL, P, E)."""

    def __init__(self, model: Flamingo, images: Tensor, labels: NDArray[np.integer], size: int = POOL) -> None:
        rng, jitters = np.random.RandomState(SEED), torch.Generator().manual_seed(SEED)
        pick = training_scans(labels, rng)
        self.composed = [composed(pick, rng) for _ in range(size)]
        with torch.no_grad():
            self.features = torch.cat(
                [
                    model.features(draw([places for _, places in part], images, jitters)).half()
                    for part in batched(self.composed, DRAWN)
                ]
            )

    def look(self, rng: np.random.RandomState) -> tuple[Digits, int]:
        """Draw the digits of an image and its number."""
        number = rng.randint(len(self.composed))
        return self.composed[number][0], number


def batched(found: list, size: int) -> Iterator[list]:
    return (found[first : first + size] for first in range(0, len(found), size))


def logits(model: Flamingo, batch: Batch, pool: Pool) -> Tensor:
    """The logits (B, S, V) of dialogues whose images are numbers in ``pool``."""
    numbers = torch.tensor([number for row in batch.images for number in row])
    states = model.keys_values(model.resampler(pool.features[numbers].float()))  # (images, H, 1, N, D) each
    most = max(map(len, batch.images))
    places, first = torch.zeros(len(batch.images), most, dtype=torch.int64), 0
    for row, images in enumerate(batch.images):
        places[row, : len(images)] = torch.arange(first, first + len(images))  # the rest is never seen
        first += len(images)
    rows = tuple(state.squeeze(2)[places].transpose(1, 2) for state in states)  # (B, H, I, N, D)
    return model(batch.tokens, *rows)


def joined(reader: Reader, language: nn.Module, tokenizer: Tokenizer) -> Flamingo:
    """A Flamingo of both models, frozen, whose gates are closed."""
    torch.manual_seed(SEED)
    model = Flamingo(flamingo_config(tokenizer.get_vocab_size()), "image-text-to-text")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.resampler.latents)
    model.vision_model.load_state_dict(reader.vit.state_dict())
    model.language_model.load_state_dict(language.state_dict())
    for name in FROZEN:
        getattr(model, name).requires_grad_(False)
    return model


def train(model: Flamingo, tokenizer: Tokenizer, pool: Pool, steps: int) -> Flamingo:
    """The averaged weights after ``steps``; the last step ships, none is picked."""
    batches = iter(Batches(tokenizer, pool.look, np.random.RandomState(SEED), ROWS, TALKS))
    matrices = [weight for name, weight in model.named_parameters() if name.endswith(".weight")]
    gates = [weight for name, weight in model.named_parameters() if name.endswith("_gate")]
    updates = Updates(model, matrices, WARMUP, steps, {GATES_LR: gates})
    frozen = {name: weight.clone() for name, weight in model.state_dict().items() if name.startswith(FROZEN)}
    began = time.process_time()
    for step in range(1, steps + 1):
        batch = next(batches)
        of_answers = (batch.weights == 1).float()
        loss = weighted_loss(logits(model, batch, pool), batch.tokens, of_answers)
        updates.apply(loss)
        if step % 100 == 0:
            opened = " ".join(f"{float(gate.detach().tanh()):.2f}" for gate in gates)
            seconds = time.process_time() - began
            print(
                f"stage 3, step {step} of {steps}, {seconds:.0f} s: answers {loss:.3f} nats a token, gates {opened}",
                flush=True,
            )
    updates.finish()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in frozen.items())
    return model


def rounded(module: nn.Module) -> nn.Module:
    """Round weights to FP16, as they are stored."""
    module.load_state_dict({name: weight.half().float() for name, weight in module.state_dict().items()})
    return module.eval()


def stage(path: Path | None, made: nn.Module, train: Callable[[], nn.Module]) -> nn.Module:
    """Return what ``train`` gives in FP16, or load it into ``made`` where ``path`` is there; and keep it there."""
    if path is not None and path.is_file():
        made.load_state_dict(load_file(path))
        return rounded(made)
    found = rounded(train())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(found.state_dict(), path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--dev", action="store_true", help="score on every fifth training scan")
    parser.add_argument("--stages", type=Path, help="folder for the first two stages")
    parser.add_argument("--steps", type=int, default=STEPS, help="of stage 3")
    arguments = parser.parse_args()
    if arguments.dev == (arguments.out is not None):
        parser.error("give either --out DIR or --dev")

    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)
    every, digits = scans()
    fitted, _ = split(digits)
    examples = question_examples()
    if arguments.dev:
        fitted, chosen = np.delete(fitted, slice(0, None, 5)), fitted[::5]
        scored, cases = every[chosen], held_out(digits[chosen], [asked for _, asked, _ in examples])
    else:
        scored, cases = heldout_questions()
    images, labels = torch.from_numpy(every[fitted]), digits[fitted]

    tokenizer = make_tokenizer()
    kept = arguments.stages or Path()
    names = [kept / "vision.safetensors", kept / "language.safetensors"] if arguments.stages else [None, None]
    reader = stage(names[0], Reader(), lambda: train_vision(images, labels))
    language = stage(names[1], initial(text_config(tokenizer.get_vocab_size())), lambda: train_language(tokenizer))
    model = joined(reader, language, tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
    pool = Pool(model, images, labels)
    frozen = {name: digest(getattr(model, name)) for name in FROZEN}
    rounded(train(model, tokenizer, pool, arguments.steps))
    if arguments.out is not None:
        save(model, model.config, tokenizer, arguments.out, frozen)
    report(model, tokenizer, scored, cases, examples)


if __name__ == "__main__":
    main()

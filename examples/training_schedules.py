"""The optimizers, learning rates and weight average that the stages of the reference Flamingo share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from muon import Muon
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

AVERAGE = 0.995  # decay of the weight average that ships, per step
PEAK_LR, PEAK_LR_OTHERS = 0.02, 3e-3  # of Muon (Jordan et al., 2024) for the layers' matrices, AdamW for the rest
WEIGHT_DECAY = 0.05


class Updates:
    """Two optimizers, their learning rates, and the running average of a model's weights.

    ``matrices`` are Muon's, as far as they have two axes; ``peaks`` has AdamW's learning rate of some of the others.
    Weights that need no gradient stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: Iterable[nn.Parameter],
        warmup: int,
        steps: int,
        peaks: Mapping[float, Sequence[nn.Parameter]] | None = None,
    ) -> None:
        hidden = [parameter for parameter in matrices if parameter.ndim == 2 and parameter.requires_grad]
        groups = [{"params": list(chosen), "lr": peak} for peak, chosen in (peaks or {}).items()]
        known = {id(parameter) for chosen in (hidden, *(peaks or {}).values()) for parameter in chosen}
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        others = [parameter for parameter in self.learned if id(parameter) not in known]
        self.model = model
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr=PEAK_LR, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(
                [{"params": others}, *groups], lr=PEAK_LR_OTHERS, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            ),
        ]
        self.rates = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda step: factor(step, warmup, steps))
            for each in self.optimizers
        ]
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))

    def apply(self, loss: torch.Tensor) -> None:
        """Take a step down ``loss``, a scalar."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        for each in (*self.optimizers, *self.rates):
            each.step()
        self.averaged.update_parameters(self.model)

    def finish(self) -> None:
        """Give the model its averaged weights."""
        self.model.load_state_dict(self.averaged.module.state_dict())
        self.model.eval()


def factor(step: int, warmup: int, steps: int) -> float:
    """Up in a line, down as a cosine to a hundredth; a factor of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

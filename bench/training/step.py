"""The step of training that all peers take: the same loss, clipping and optimiser as ours."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Training:
    """A model in training on one batch; `logits` computes what it predicts after each token."""

    def __init__(self, model: nn.Module, rows: Sequence[Sequence[int]], dtype: str, logits: Callable[[Tensor], Tensor]):
        tokens = torch.tensor(rows)
        self.tokens, self.following = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.model, self.logits, self.half = model.train(), logits, dtype == "bfloat16"
        parameters = list(model.parameters())
        groups = [
            {"params": [one for one in parameters if one.dim() >= 2], "weight_decay": 0.1},
            {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(self) -> float:
        """Forward, backward, clipping and update; the loss before it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.logits(self.tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), self.following.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

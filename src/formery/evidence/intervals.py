"""How sure a mean is: intervals by drawing the same values again."""

from collections.abc import Sequence

import torch


def bootstrap(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Between which bounds the mean lies in 95 of 100 samples that are drawn from the values, as many each time."""
    known = torch.tensor(values, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    sampled = known[torch.randint(len(known), (draws, len(known)), generator=draw)].mean(1)
    low, high = torch.quantile(sampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

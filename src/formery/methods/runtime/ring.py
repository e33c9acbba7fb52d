"""Ring Attention for decoding: every process's keys and values travel past all others, the baseline of Tree Attention.

Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context", 2023. In each of
`processes - 1` steps a process hands the share that it has just looked at to the next one and takes the next share from
the one before.
"""

from jaxtyping import Float
from torch import Tensor

from formery.parts.kernels.partial import Partial, merged
from formery.parts.spread import Share, SpreadAttention, share_of


def around(share: Share) -> Float[Tensor, "batch head time value"]:
    """Attention to the keys of all processes, the same bits in each.

    Besides its own share a process holds the one that it passes on and the one that arrives.
    """
    rank, size = share.line.rank, share.line.size
    parts: dict[int, Partial] = {rank: share.own()}
    held = (share.keys, share.values)
    for step in range(1, size):
        whose = (rank - step) % size
        slots = share_of(share.slots, whose, size)
        leaving = [one.transpose(1, 2).contiguous() for one in held]  # as a state holds them, so that nothing is copied
        arriving = [one.new_empty(one.shape[0], slots, *one.shape[2:]) for one in leaving]
        share.line.exchange(leaving, (rank + 1) % size, arriving, (rank - 1) % size)
        keys, values = (one.transpose(1, 2) for one in arriving)
        parts[whose], held = share.of(whose, keys, values), (keys, values)
    # In the order of the processes, not of arrival: else each would round in another way.
    return merged(parts[one] for one in range(size)).value


class RingAttention(SpreadAttention):
    """Self-attention whose keys and values are passed around."""

    def together(self, share: Share) -> Float[Tensor, "batch head time dim"]:
        return around(share)

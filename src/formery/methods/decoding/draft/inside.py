"""Training a guide that works inside of the target's own decode state: the text is read once, then it attends to it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.generate.within import Sections, writer
from formery.models import EncoderDecoder, Model
from formery.parts import State
from formery.parts.native import using
from formery.train.objective import Batch


@torch.no_grad()
def read(
    model: Model, batch: Batch, sections: Sections, spare: int
) -> tuple[State, list[Float[Tensor, "batch time width"]]]:
    """The frozen model's state after a batch of `OwnBatches`, and its stream of vectors before and behind each section.

    spare: for how many more tokens of each row the state has room.
    """
    tokens, positions = batch["tokens"], batch["positions"]
    capacity = tokens.shape[1] + spare
    if isinstance(model, EncoderDecoder):
        sources = [
            row[at >= 0].tolist() for row, at in zip(batch["source"], batch["source_positions"], strict=True)
        ]
        state, _ = model.begin(sources, capacity)
    else:
        state = writer(model).start(len(tokens), capacity)
    with using(False):  # the kernels, which compute in 32 bits, are made for few tokens at a time
        context = sections.enter(state, tokens.shape[1], positions)
        streams = [sections.embedded(tokens, context)]
        for number in range(len(sections.layers)):
            streams.append(sections.run(number, streams[-1], context))
    return state, streams


def some_columns(guide: nn.Module, batch: Batch, ahead: int, most: int) -> Int[Tensor, "column"]:
    """At most so many places, the same in all texts, where the token `ahead` places further was written by the model.

    While learning they are taken by chance, else evenly spread.
    """
    columns = batch["written"][:, ahead:].any(0).nonzero()[:, 0]
    if guide.training:
        return columns[torch.randperm(len(columns))[:most]].sort().values
    return columns[:: -(-len(columns) // most) or 1]

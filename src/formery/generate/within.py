"""A decoder cut into sections of its layers, each of which can be run by itself inside of a decode state.

A drafter that works inside of the target's own state needs that: it takes the stream of vectors out between two
layers, or puts vectors of its own in there, which then attend to what the target has read.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.generate.target import Begun, Target
from formery.models import Decoder, EncoderDecoder, Model
from formery.parts import Context, State
from formery.parts.native import using
from formery.parts.native.program import Program
from formery.parts.native.stack import chosen, plainly, run


class Sections:
    """The layers of a decoder, cut before the layers of these numbers; its norm belongs to the last section.

    state: whose passes they take part in; what was compiled for it is used again.
    """

    def __init__(self, decoder: Decoder, cuts: Sequence[int], state: State | None = None):
        edges = [0, *cuts, len(decoder.layers)]
        self.decoder = decoder
        self.layers = [nn.ModuleList(decoder.layers[first:last]) for first, last in pairwise(edges)]
        self.norms: list[nn.Module | None] = [*[None] * len(cuts), decoder.norm]
        # How often each part that remembers has run before each section.
        self.remembering: list[Counter[nn.Module]] = [Counter()]
        for layers in self.layers:
            layers.training = decoder.training  # of the list alone: a new one says that it is
            found = Counter(part for layer in layers for part in layer.modules() if hasattr(part, "start"))
            self.remembering.append(self.remembering[-1] + found)
        known, width = None if state is None else state.pieces, decoder.embedding.width
        with torch.no_grad(), using(decoder.compiled):
            self.pieces = [
                chosen(known, layers, norm, width) for layers, norm in zip(self.layers, self.norms, strict=True)
            ]
        self.compiled = all(
            pieces is not None and all(isinstance(piece, Program) for piece in pieces) for pieces in self.pieces
        )

    def enter(
        self,
        state: State,
        time: int,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
        before: int = 0,
    ) -> Context:
        """Takes the next `time` slots of each row (positions and visible as in `Decoder.read`); the pass over them.

        before: how many sections the pass leaves out at its beginning.
        """
        context = self.decoder.context(time, state, positions, visible)
        context.turns.update(self.remembering[before])
        return context

    def embedded(self, tokens: Int[Tensor, "batch time"], context: Context) -> Float[Tensor, "batch time width"]:
        """What the first section reads."""
        with using(self.decoder.compiled):
            embedded: Tensor = self.decoder.embedding(tokens, context)
            return embedded

    def entered(self, tokens: Int[Tensor, "batch time"], context: Context) -> Float[Tensor, "batch time width"]:
        """As `embedded`, in the precision in which sections pass on what a whole pass would not round between layers.

        Kernels keep the stream in 32 bits from the first layer to the last, whatever the weights are in.
        """
        embedded = self.embedded(tokens, context)
        return embedded.float() if self.compiled else embedded

    def run(
        self, number: int, hidden: Float[Tensor, "batch time width"], context: Context
    ) -> Float[Tensor, "batch time width"]:
        """One section; the last one gives normed vectors."""
        if torch.is_grad_enabled():
            return plainly(self.layers[number], self.norms[number], hidden, context)
        with using(self.decoder.compiled):
            return run(self.layers[number], self.norms[number], hidden, context, self.pieces[number])


    def going_on(self, number: int, vectors: Float[Tensor, "batch most width"]) -> Begun:
        """How a pass of the target goes on at that section, where the sections before have left these vectors of it."""

        def begun(
            tokens: Int[Tensor, "batch time"],
            state: State,
            positions: Int[Tensor, "batch time"] | None = None,
            visible: Bool[Tensor, "batch time slot"] | None = None,
        ) -> Float[Tensor, "batch time width"]:
            time = tokens.shape[1]
            found = self.run(number, vectors[:, :time], self.enter(state, time, positions, visible, number))
            return found.to(self.decoder.embedding.weight.dtype)

        return begun


class Listening:
    """Runs the target's next pass in two sections, and keeps what passes between them.

    between: the stream of vectors at each token of the latest pass, behind the first section; None before any.
    """

    def __init__(self, target: Target, layer: int):
        self.target, self.sections = target, Sections(writer(target.model), [layer], target.state)
        self.between: Float[Tensor, "batch time width"] | None = None

    def next_pass(self) -> None:
        """Has the target's next pass run so; what comes out is the same, bit for bit."""
        self.target.begun = self._run

    def _run(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        context = self.sections.enter(state, tokens.shape[1], positions, visible)
        self.between = self.sections.run(0, self.sections.entered(tokens, context), context)
        return self.sections.run(1, self.between, context).to(self.sections.decoder.embedding.weight.dtype)


def writer(model: Model) -> Decoder:
    """The part of a model that writes."""
    return model.decoder if isinstance(model, EncoderDecoder) else model

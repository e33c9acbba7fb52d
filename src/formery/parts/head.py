"""What is made of an encoder's vectors; a head is called with them and with their positions (-1: padding)."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.parts.embed import Embedding, TiedOutput
from formery.parts.linear import Linear
from formery.parts.part import Part
from formery.parts.part import activation as function

Positions = Int[Tensor, "batch time"] | None


class Pooler(Part):
    """`tanh(dense(x[0]))`: one vector for the whole, from that of the first place (Devlin et al., 2019)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.dense = Linear(width, width, bias=True)

    def forward(
        self, hidden: Float[Tensor, "batch time width"], positions: Positions = None
    ) -> Float[Tensor, "batch width"]:
        return self.dense(hidden[:, 0]).tanh()


class FirstPlace(Part):
    """`x[0]`: the vector of the first place stands for the whole."""

    def forward(
        self, hidden: Float[Tensor, "batch time width"], positions: Positions = None
    ) -> Float[Tensor, "batch width"]:
        return hidden[:, 0]


class MeanPool(Part):
    """The mean of the vectors, padding aside (Reimers and Gurevych, 2019)."""

    def forward(
        self, hidden: Float[Tensor, "batch time width"], positions: Positions = None
    ) -> Float[Tensor, "batch width"]:
        if positions is None:
            return hidden.mean(1)
        padding = (positions < 0)[..., None]
        return hidden.masked_fill(padding, 0).sum(1) / (~padding).sum(1).clamp(min=1)


class Normalised(Part):
    """`pool(x) / |pool(x)|`: vectors of length one, whose products are cosines."""

    def __init__(self, pool: Part):
        super().__init__()
        self.pool = pool

    def forward(
        self, hidden: Float[Tensor, "batch time width"], positions: Positions = None
    ) -> Float[Tensor, "batch width"]:
        return nn.functional.normalize(self.pool(hidden, positions), dim=-1)


class Classifier(Part):
    """`map(pool(x))`: a logit for each class of the whole."""

    def __init__(self, pool: Part, map: Linear):
        super().__init__()
        self.pool, self.map = pool, map

    def forward(
        self, hidden: Float[Tensor, "batch time width"], positions: Positions = None
    ) -> Float[Tensor, "batch label"]:
        return self.map(self.pool(hidden, positions))


class MaskedOutput(Part):
    """`output(norm(activation(transform(x))))`: logits of the word at each place, by the embedding's own table."""

    def __init__(self, embedding: Embedding, activation: str, norm: Part):
        super().__init__()
        self.embedding, self.activation, self.norm = embedding, activation, norm
        self.transform = Linear(embedding.width, embedding.width, bias=True)
        self.output = TiedOutput(embedding, bias=True)
        function(activation)

    def forward(
        self, hidden: Float[Tensor, "batch time width"], positions: Positions = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        return self.output(self.norm(function(self.activation)(self.transform(hidden))))


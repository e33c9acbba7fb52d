"""llama2.c's files of version 0: seven numbers, then every weight in float32.

The format has one architecture: Llama's, with RMSNorm of epsilon 1e-5 and rotary base 10,000, and no room to say
otherwise. It turns neighbouring entries of a head; here the rows of the query and key maps are put in another order
instead, so that the usual halves are turned.
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy
import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.files import atomic_write
from formery.models.conventions import Conventions
from formery.models.decoder import Decoder
from formery.models.hub.anatomy import anatomy, differences
from formery.models.hub.llama2c_tokenizer import read_tokenizer
from formery.parts import (
    Attention,
    Embedding,
    GatedMLP,
    Layer,
    Output,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    TiedOutput,
)

NUMBERS = struct.Struct("<7i")
MAGIC = 0x616B3432  # what the files of later versions begin with
MOST_LAYERS = 1024
NARROW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Header:
    """The seven numbers; in the file a negative vocabulary means that the output is not tied."""

    width: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    max_length: int
    tied: bool = True

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.width // self.heads

    @property
    def size(self) -> int:
        """How many bytes a file with these numbers has."""
        return NUMBERS.size + 4 * sum(math.prod(shape) for _, shape in self.arrays())

    def flaw(self) -> str | None:
        """What no model can have, if there is such a thing."""
        numbers = astuple(self)[:7]
        if not 0 < min(numbers) <= max(numbers) < 2**31:
            return f"sizes of {', '.join(map(str, numbers))}, which are not all positive numbers of 32 bits"
        if self.layers > MOST_LAYERS:
            return f"{self.layers} layers, more than {MOST_LAYERS}"
        if self.width % self.heads or self.head_width % 2:
            return f"{self.heads} heads for a width of {self.width}, which does not give them an even width"
        if self.heads % self.key_value_heads:
            return f"{self.key_value_heads} key and value heads, which {self.heads} heads cannot share evenly"
        return None

    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """The file's arrays in their order: the parameter that each is (of all layers, for `*`), and its shape."""
        width, hidden, layers, keys = self.width, self.hidden, self.layers, self.key_value_heads * self.head_width
        classifier = [] if self.tied else [("output.map.weight", (self.vocabulary, width))]
        return [
            ("embedding.weight", (self.vocabulary, width)),
            ("layers.*.sublayers.0.norm.weight", (layers, width)),
            ("layers.*.sublayers.0.inner.query.weight", (layers, width, width)),
            ("layers.*.sublayers.0.inner.key.weight", (layers, keys, width)),
            ("layers.*.sublayers.0.inner.value.weight", (layers, keys, width)),
            ("layers.*.sublayers.0.inner.output.weight", (layers, width, width)),
            ("layers.*.sublayers.1.norm.weight", (layers, width)),
            ("layers.*.sublayers.1.inner.gate.weight", (layers, hidden, width)),
            ("layers.*.sublayers.1.inner.down.weight", (layers, width, hidden)),
            ("layers.*.sublayers.1.inner.up.weight", (layers, hidden, width)),
            ("norm.weight", (width,)),
            ("cosine", (self.max_length, self.head_width // 2)),
            ("sine", (self.max_length, self.head_width // 2)),
            *classifier,
        ]

    def model(self) -> Decoder:
        """A model of these sizes, without memory for its weights."""
        width, position = self.width, Rotary()

        def layer() -> Layer:
            attention = Attention(width, self.heads, self.key_value_heads, position=position)
            feedforward = GatedMLP(width, self.hidden)
            return Layer([PreNorm(RMSNorm(width, 1e-5), inner) for inner in (attention, feedforward)])

        with torch.device("meta"):
            embedding = Embedding(self.vocabulary, width)
            output = TiedOutput(embedding) if self.tied else Output(width, self.vocabulary)
            stack = [layer() for _ in range(self.layers)]
            return Decoder(embedding, stack, RMSNorm(width, 1e-5), output, self.max_length)


def looks_like(path: str | Path) -> bool:
    """Whether `path` is a `.bin` that has exactly the size that its first seven numbers ask for."""
    try:
        return Path(path).suffix == ".bin" and _header(Path(path)).size > 0
    except FormeryError:
        return False


def laid_out(path: str | Path, tokenizer: str | Path | None = None) -> Decoder:
    """The model in a file of version 0 with its vocabulary, without its weights; raises FormeryError as `read` does."""
    path = Path(path)
    header = _header(path)
    beside = (path.parent / name for name in (f"tok{header.vocabulary}.bin", "tokenizer.bin"))
    vocabulary = next((one for one in beside if one.is_file()), None) if tokenizer is None else Path(tokenizer)
    model = header.model()
    model.conventions = Conventions(stop=(1, 2))  # a text ends where the next begins
    model.tokenizer = None if vocabulary is None else read_tokenizer(vocabulary, header.vocabulary)
    return model


def read(path: str | Path, tokenizer: str | Path | None = None, dtype: torch.dtype | None = torch.float32) -> Decoder:
    """The model in a file of version 0, ready to generate; what is not reordered stays in the file's pages.

    tokenizer: the vocabulary file; unless given, tok<vocabulary>.bin or tokenizer.bin beside the weights, and none
    where there is neither. dtype: of the weights, None for that of the file. Raises FormeryError where the header
    contradicts itself or the file's size, and for a vocabulary that is damaged or of another size.
    """
    path = Path(path)
    header, model = _header(path), laid_out(path, tokenizer)
    for name, tensor in _tensors(path, header):
        if name.endswith((".query.weight", ".key.weight")):
            tensor = tensor.view(-1, header.head_width // 2, 2, header.width).transpose(1, 2).reshape(tensor.shape)
        owner = model.get_submodule(name.removesuffix(".weight"))
        owner.weight = nn.Parameter(tensor if dtype is None else tensor.to(dtype))
    return model.eval()


def write(model: Part, path: str | Path) -> None:
    """Writes a file of version 0, whole or not at all, from which `read` makes the very same weights.

    Weights of 16 bits are widened. Raises FormeryError naming the part that the format has no room for (a bias,
    another norm, mask or rotary base, layers that differ), and where the disk refuses.
    """
    header = _fitting(model)
    parameters = dict(model.named_parameters())
    positions = torch.arange(header.max_length)[:, None]
    angle = positions * (1.0 / 10_000 ** (torch.arange(0, header.head_width, 2) / header.head_width))
    tables = {"cosine": angle.cos(), "sine": angle.sin()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        *sizes, vocabulary, length = astuple(header)[:7]
        file.write(NUMBERS.pack(*sizes, vocabulary if header.tied else -vocabulary, length))
        for stacked, _ in header.arrays():
            for name in _each(stacked, header.layers):
                tensor = tables[name] if name in tables else parameters[name].detach()
                if name.endswith((".query.weight", ".key.weight")):
                    halves = tensor.reshape(-1, 2, header.head_width // 2, header.width)
                    tensor = halves.transpose(1, 2).reshape(tensor.shape)
                file.write(tensor.cpu().float().contiguous().numpy().astype("<f4", copy=False).data)


def _header(path: Path) -> Header:
    """The file's numbers, which its size bears out; raises FormeryError otherwise."""
    if not os.path.isfile(path):
        raise FormeryError(f"there is no file {path}.")
    try:
        with path.open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(NUMBERS.size)
    except OSError as error:
        raise FormeryError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(start) < NUMBERS.size:
        raise FormeryError(f"{path} is truncated: {size} bytes, where the header of a llama2.c file has 28.")
    width, hidden, layers, heads, key_value_heads, vocabulary, length = NUMBERS.unpack(start)
    if width == MAGIC:
        raise FormeryError(f"{path} is a llama2.c file of version {hidden}; export it as version 0, which is read.")
    header = Header(width, hidden, layers, heads, key_value_heads, abs(vocabulary), length, vocabulary > 0)
    if flaw := header.flaw():
        raise FormeryError(f"{path} is no llama2.c file of version 0: its header tells of {flaw}.")
    if header.size != size:
        kind = "truncated" if size < header.size else "longer than it should be"
        raise FormeryError(
            f"{path} is {kind}, or no llama2.c file of version 0: "
            f"{size} bytes, where its header tells of {header.size}."
        )
    return header


def _tensors(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and its place in the mapped file; writing there changes a private copy of the page."""
    try:
        # Mapped anew here, so a file that shrank since its size was read is noticed.
        numbers = numpy.memmap(path, "<f4", mode="c", offset=NUMBERS.size, shape=(header.size // 4 - 7,))
    except (OSError, ValueError) as error:
        raise FormeryError(f"{path} cannot be read: {error}.") from error
    rest: Float[Tensor, "number"] = torch.from_numpy(numbers)
    for stacked, shape in header.arrays():
        array, rest = rest.split([size := math.prod(shape), len(rest) - size])
        if stacked not in ("cosine", "sine"):
            array = array.view(shape)
            yield from zip(_each(stacked, header.layers), array if "*" in stacked else [array], strict=True)


def _each(stacked: str, layers: int) -> list[str]:
    """The names of the parameters that an array holds."""
    return [stacked.replace("*", str(layer)) for layer in range(layers)] if "*" in stacked else [stacked]


def _fitting(model: Part) -> Header:
    """The numbers of a model that the format can hold; raises FormeryError for any other."""
    attention = next((one for one in model.modules() if isinstance(one, Attention)), None)
    feedforward = next((one for one in model.modules() if isinstance(one, GatedMLP)), None)
    if not isinstance(model, Decoder) or attention is None or feedforward is None:
        raise FormeryError("llama2.c's format holds decoders of attention and gated feed-forwards alone.")
    if model.max_length is None:
        raise FormeryError("llama2.c's format needs a length that bounds the model: set its max_length.")
    header = Header(
        model.embedding.width,
        feedforward.hidden,
        len(model.layers),
        attention.heads,
        attention.groups,
        model.vocabulary,
        model.max_length,
        isinstance(model.output, TiedOutput),
    )
    if flaw := header.flaw():
        raise FormeryError(f"llama2.c's format cannot hold {flaw}.")
    if found := differences(anatomy(model), anatomy(header.model())):
        raise FormeryError(f"llama2.c's format cannot hold this model: {found[0]}.")
    if wide := [name for name, one in model.named_parameters() if one.dtype not in NARROW]:
        raise FormeryError(f"llama2.c's format holds float32: {wide[0]} is {model.get_parameter(wide[0]).dtype}.")
    return header

"""Scores of attention heads as a picture."""

from typing import TYPE_CHECKING

import torch

from formery.models.attention_maps import Head

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = dict[Head, float]


def picture(found: Scores, title: str = "retrieval score") -> "Figure":
    """The scores as a map of layers and heads; a head that a layer does not have is left blank."""
    from matplotlib.figure import Figure

    layers, width = (max(head[i] for head in found) + 1 for i in (0, 1))
    table = torch.full((layers, width), float("nan"))
    for (layer, head), value in found.items():
        table[layer, head] = value
    figure = Figure(figsize=(1.8 + 0.5 * width, 1.2 + 0.42 * layers), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (layer, head), value in found.items():
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k")
    axes.set(title=title, xlabel="head", ylabel="layer", xticks=range(width), yticks=range(layers))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes)
    return figure

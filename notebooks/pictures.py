"""A layer, and a table of sensitivities, as matplotlib figures.

    picture(model[3], R)         what a layer does; in a cell of a notebook it shows
    heat_map(table)              how much each layer hurts; budget.py's tables have it as `.picture()`

Needs abcnets.py and matplotlib.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abcnets

_BLUE, _PALE, _RED, _DARK, _GREY = "#0072B2", "#B8D4E8", "#D55E00", "#333333", "#BBBBBB"  # Okabe and Ito's, and greys
_ABC = (abcnets.ABCConv1d, abcnets.ABCConv2d, abcnets.ABCConv3d, abcnets.ABCLinear)


@torch.no_grad()
def picture(layer: nn.Module, input: Tensor | None = None):
    """What a layer does, as a matplotlib Figure: `picture(model[3], R)` in a cell of a notebook shows it.

    - Its weights, each channel in standard deviations from its mean; where they are cut into bins (at -u_m, dashed) and
      the M + 1 levels of Wq (dots: the channels' mean, bars: from the 10th to the 90th percentile of the channels).
    - A few kernels W, their bases B_1..B_M with the scales alpha_m, and their sum Wq. Kernels of one tap and linear
      layers are shown as a corner of the matrix outputs x inputs, 1-D kernels as inputs x taps, 3-D ones by slices.
    - The staircase of its activations, Aq against R, with the thresholds 1/2 - v_n (dashed), over the histogram of the
      input if one is given.

    A side that stays float is left out. A packed layer has no W, and none of the first panel.

    Args:
        layer: an ABC layer, active or not, or a `PackedLayer`.
        input: values that reach the layer, of any shape.

    Returns: the Figure; `.savefig(path)` writes it.
    Raises: TypeError for another module, ValueError for a layer with both sides float, ImportError without matplotlib.
    """
    packed = isinstance(layer, abcnets.PackedLayer)
    if not packed and not isinstance(layer, _ABC):
        raise TypeError(f"picture takes one ABC layer or packed layer, got {type(layer).__name__}; "
                        "a layer of a model is model.get_submodule(name)")  # fmt: skip
    vs = 0.5 - layer.thresholds if packed else layer.vs
    has_weights, has_activations = packed or layer.us is not None, vs is not None and len(vs) > 0
    if not has_weights and not has_activations:
        raise ValueError("picture has nothing to show: both sides of this layer are float")
    plt = _pyplot()
    tiles = _tiles(layer) if has_weights else [[]]
    widths = [3.4] * (has_weights and not packed) + [0.85 * len(tiles[0]) + 0.2] * has_weights + [3.8] * has_activations
    look = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
            "axes.spines.right": False, "axes.grid": False, "legend.frameon": False}  # fmt: skip
    with plt.rc_context(look):
        figure, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 2.9), width_ratios=widths,
                                    squeeze=False, layout="constrained")  # fmt: skip
        axes = list(axes[0])
        if has_weights and not packed:
            _draw_weights(axes.pop(0), layer)
        if has_weights:
            _draw_tiles(axes.pop(0), tiles)
        if has_activations:
            _draw_staircase(axes.pop(0), vs.float().cpu(), layer.betas.float().cpu(), input)
        plt.close(figure)  # a notebook shows what is returned, once
    return figure


def _draw_weights(axis, layer: nn.Module) -> None:
    W, us = layer.weight.float().cpu(), layer.us.float().cpu()
    alphas = abcnets.fit_weight(W, us, layer.per_channel).t()
    W = W.reshape(len(alphas), -1)  # a row a channel; where not per channel, one in all
    # The lowest level has all bases at -1; from there up they turn to +1 in the order of their shifts.
    steps = 2 * alphas[:, us.argsort(descending=True, stable=True)]
    levels = torch.cat([torch.zeros(len(W), 1), steps.cumsum(1)], dim=1) - alphas.sum(1, keepdim=True)
    std = W.std(1, keepdim=True) if W.shape[1] > 1 else torch.zeros_like(W)
    std, mean = std.clamp(min=torch.finfo(W.dtype).tiny), W.mean(1, keepdim=True)
    z, levels = (W - mean) / std, (levels - mean) / std
    reach = min(4.0, z.abs().max().item()) or 1.0
    axis.hist(z.flatten().double().numpy(), bins=60, range=(-reach, reach), color=_PALE)
    for u in us.tolist():
        axis.axvline(-u, color=_DARK, linestyle="--", linewidth=1)
    low, high = (levels.quantile(q, dim=0).tolist() for q in (0.1, 0.9))
    height = -0.06 * axis.get_ylim()[1]
    axis.hlines([height] * len(low), low, high, color=_RED, linewidth=3, alpha=0.4)
    axis.plot(levels.mean(0).tolist(), [height] * len(low), "o", color=_RED, markersize=6)
    axis.set_ylim(bottom=2 * height)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_title(f"{W.numel():,} weights, {len(low)} levels")
    axis.set_xlabel("$W$, in deviations from the mean" + (" of its channel" if layer.per_channel else ""))


def _tiles(layer: nn.Module, count: int = 3) -> list[list[tuple[Tensor, str, str]]]:
    """Rows of (2-D image in [-1, 1], name, scale): of a few kernels W, B_1..B_M, Wq."""
    if isinstance(layer, abcnets.PackedLayer):
        B, alphas, W = layer.unpack(), layer.alphas, None
        Wq = torch.einsum("mo,mo...->o...", alphas, B)
    else:
        W, us = layer.weight.float(), layer.us.float()
        B, Wq = (make(W, us, layer.per_channel) for make in (abcnets.weight_bases, abcnets.quantize_weight))
        alphas = abcnets.fit_weight(W, us, layer.per_channel).expand(-1, len(W))
    shown = Wq if W is None else W
    dims = [size for size in shown.shape[2:] if size > 1]
    if not dims:  # a matrix
        rows, scaled = [(slice(12), slice(12))], False
    elif shown.ndim == 3:  # inputs x taps
        rows, scaled = [(o, slice(8)) for o in shown.flatten(1).norm(dim=1).topk(min(2, len(shown))).indices], True
    else:  # of the channels with the largest weights, the largest kernel
        norms, inputs = shown.flatten(2).norm(dim=2).max(1)
        rows, scaled = [(o, inputs[o]) for o in norms.topk(min(count, len(norms))).indices], True

    def image(x):
        x = x.reshape(len(x), -1) if not dims else x
        if x.ndim == 3:  # slices side by side, NaN between them
            x = torch.cat([F.pad(piece, (0, 1), value=math.nan) for piece in x], 1)[:, :-1]
        return x.cpu()

    tiles = []
    for row in rows:
        largest = max(x[row].abs().max().item() for x in (shown, Wq)) or 1.0
        scales = [f"{alpha:.2g}" for alpha in alphas[:, row[0]].tolist()] if scaled else [""] * len(B)
        tiles.append([
            *([(image(W[row]) / largest, "$W$", "")] if W is not None else []),
            *((image(base[row]), f"$B_{m + 1}$", f"× {scale}" if scaled else "")
              for m, (base, scale) in enumerate(zip(B, scales))),
            (image(Wq[row]) / largest, "$W_q$", ""),
        ])  # fmt: skip
    return tiles


def _draw_tiles(axis, tiles) -> None:
    """Each image into a cell of its own; black is negative, white is positive."""
    from matplotlib import colormaps

    grey, step = colormaps["gray"].with_extremes(bad=_PALE), 1.25  # of a row, in cell widths: room for the scales
    for y, row in enumerate(tiles):
        for x, (values, name, scale) in enumerate(row):
            height, width = values.shape
            half_width, half_height = 0.44 * width / max(height, width), 0.44 * height / max(height, width)
            left, right, top, bottom = x - half_width, x + half_width, step * y - half_height, step * y + half_height
            axis.imshow(values.numpy(), cmap=grey, vmin=-1, vmax=1, extent=(left, right, bottom, top))
            axis.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], "-", color=_GREY, lw=0.8)
            if y == 0:
                axis.text(x, top - 0.08, name, ha="center", va="bottom", fontsize=10)
            axis.text(x, bottom + 0.03, scale, ha="center", va="top", fontsize=7, color=_RED)
    axis.set_xlim(-0.5, len(tiles[0]) - 0.5)
    axis.set_ylim(step * (len(tiles) - 1) + 0.75, -0.8)
    axis.set_aspect("equal")
    axis.axis("off")


def _draw_staircase(axis, vs: Tensor, betas: Tensor, input: Tensor | None) -> None:
    thresholds = 0.5 - vs
    low, high = thresholds.min().item(), thresholds.max().item()
    low, high = min(low, 0.0) - 0.5, high + max(0.5, 0.6 * (high - low))
    if input is not None:
        values = input.detach().flatten()
        values = values[:: max(1, len(values) // 1_000_000)].double().cpu()
        low, high = min(low + 0.3, values.quantile(0.001).item()), max(high - 0.3, values.quantile(0.995).item())
        behind = axis.twinx()
        counts, _, _ = behind.hist(values.numpy(), bins=60, range=(low, high), color=_PALE)
        # The pile of a rectified input at 0 is cut off where it would flatten all the rest.
        behind.set_ylim(0, max(1, min(1.1 * max(counts), 2 * sorted(counts)[-2])))
        behind.set_yticks([])
        behind.spines[:].set_visible(False)
        behind.set_zorder(-1)
        axis.patch.set_visible(False)
    R = torch.cat([torch.linspace(low, high, 400), thresholds]).sort().values
    Aq = abcnets.quantize_activation(R, vs, betas)
    axis.plot(R.tolist(), R.tolist(), color=_GREY, linestyle="-", linewidth=1.2, label="$R$")
    axis.step(R.tolist(), Aq.tolist(), where="post", color=_BLUE, linestyle="-", label="$A_q$")
    for t in thresholds.tolist():
        axis.axvline(t, color=_DARK, linestyle="--", linewidth=1)
    room = 0.15 * (Aq.max() - Aq.min()).abs().item() + 0.1
    axis.set_xlim(low, high)
    axis.set_ylim(Aq.min().item() - room, Aq.max().item() + room)
    axis.set_title("activations" + (", over what reaches the layer" if input is not None else ""))
    axis.set_xlabel("$R$")
    axis.legend(loc="lower right")


def heat_map(table):
    """The errors of a table that `budget.sensitivity` returned, layers down, settings across; a matplotlib Figure."""
    plt = _pyplot()
    from matplotlib.colors import LogNorm

    errors = {
        (row["layer"], row["M"], row["N"], row.get("code")): row["error"] for row in table if row["M"] or row["N"]
    }  # fmt: skip
    layers, settings = (list(dict.fromkeys(keys)) for keys in ([k[0] for k in errors], [k[1:] for k in errors]))
    # Logarithmic, since errors span decades; what is 0 takes the colour of the least that is not.
    least = min((error for error in errors.values() if error > 0), default=1e-6)
    norm = LogNorm(least, max(*errors.values(), 10 * least))
    values = [[errors.get((layer, *setting), math.nan) for setting in settings] for layer in layers]
    names = [_named(*setting) for setting in settings]
    wide = max(0.62, *(0.085 * len(line) for name in names for line in name.split("\n")))
    high = 1.3 + 0.3 * len(layers) + 0.15 * max(name.count("\n") for name in names)
    figure, axes = plt.subplots(figsize=(2.2 + wide * len(settings), high), layout="constrained")
    image = axes.imshow([[max(value, least) for value in row] for row in values], cmap="cividis_r", norm=norm,
                        aspect="auto")  # fmt: skip
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if norm(max(value, least)) > 0.5 else "black"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(settings)), names)
    axes.set_yticks(range(len(layers)), [layer or "(the model)" for layer in layers])
    axes.set(xlabel="M, N", ylabel="layer", title="Error, one layer binarized")
    axes.grid(False)
    figure.colorbar(image, label="error")
    plt.close(figure)  # it is shown where it is returned to, once
    return figure


def _named(M: int | None, N: int | None, code: str | None) -> str:
    """A setting below its column: "2, float", and under it the code where it is not the thermometer."""
    counts = ", ".join("float" if count is None else str(count) for count in (M, N))
    return counts if code in (None, "thermometer") else f"{counts}\n{code}".replace(" x ", "\nx ")


def _pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from None
    return plt

"""A layer, the idea of codes, and a table of sensitivities, as matplotlib figures; and what notebooks do with figures.

    picture(model[3], R)         what a layer does; in a cell of a notebook it shows
    numerals()                   a thermometer beside a numeral: what a code makes of the same bits
    heat_map(table)              how much each layer hurts; budget.py's tables have it as `.picture()`
    tiles(row, row)              rows of small images
    show(figure, path, alt)      in a notebook and as a file, with words for those who do not see it
    has_reader()                 whether somebody is there to move a slider

Needs abcnets.py and matplotlib; `show` and `has_reader` need IPython.
"""

import base64
import copy
import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abcnets

_BLUE, _PALE, _RED, _GREEN = "#0072B2", "#B8D4E8", "#D55E00", "#009E73"  # Okabe and Ito's
_DARK, _GREY = "#333333", "#BBBBBB"
_ABC = (abcnets.ABCConv1d, abcnets.ABCConv2d, abcnets.ABCConv3d, abcnets.ABCLinear)
_LOOK = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": False, "legend.frameon": False}  # fmt: skip


@torch.no_grad()
def picture(layer: nn.Module, input: Tensor | None = None):
    """What a layer does, as a matplotlib Figure: `picture(model[3], R)` in a cell of a notebook shows it.

    - Its weights, where they are cut into bins (dashed) and the levels of Wq (dots: the channels' mean, bars: from the
      10th to the 90th percentile of the channels). In the thermometer code each channel is shown in standard deviations
      from its mean, cut at -u_m; in the others in its root mean square, cut midway between its levels (at -u_m where
      these are learned).
    - A few kernels W, their bases B_1..B_M with the scales alpha_m, and their sum Wq. Kernels of one tap and linear
      layers are shown as a corner of the matrix outputs x inputs, 1-D kernels as inputs x taps, 3-D ones by slices.
    - The staircase of its activations, Aq (less Aq(0) where a zero stays zero) against R, with the thresholds 1/2 - v_n
      (dashed), over the histogram of the input if one is given.

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
    layer = copy.deepcopy(layer).float().cpu()  # the bases of weights in half precision are those of their float copy
    vs = 0.5 - layer.thresholds if packed else layer.vs
    has_weights, has_activations = packed or layer.us is not None, vs is not None and len(vs) > 0
    if not has_weights and not has_activations:
        raise ValueError("picture has nothing to show: both sides of this layer are float")
    plt = _pyplot()
    tiles = _tiles(layer) if has_weights else [[]]
    widths = [3.4] * (has_weights and not packed) + [0.85 * len(tiles[0]) + 0.2] * has_weights + [3.8] * has_activations
    with plt.rc_context(_LOOK):
        figure, axes = plt.subplots(1, len(widths), figsize=(sum(widths), 2.9), width_ratios=widths,
                                    squeeze=False, layout="constrained")  # fmt: skip
        axes = list(axes[0])
        if has_weights and not packed:
            _draw_weights(axes.pop(0), layer)
        if has_weights:
            _draw_tiles(axes.pop(0), tiles)
        if has_activations:
            zero = layer.zero is not None if packed else layer.zero
            _draw_staircase(axes.pop(0), vs, layer.betas, layer.code[1], zero, input)
        plt.close(figure)  # a notebook shows what is returned, once
    return figure


def _draw_weights(axis, layer: nn.Module) -> None:
    z, levels, cuts = _standardized(layer)
    reach = min(4.0, z.abs().max().item()) or 1.0
    axis.hist(z.flatten().double().numpy(), bins=60, range=(-reach, reach), color=_PALE)
    for cut in cuts.mean(0).tolist():
        axis.axvline(cut, color=_DARK, linestyle="--", linewidth=1)
    low, high = (levels.quantile(q, dim=0).tolist() for q in (0.1, 0.9))
    height = -0.06 * axis.get_ylim()[1]
    axis.hlines([height] * len(low), low, high, color=_RED, linewidth=3, alpha=0.4)
    axis.plot(levels.mean(0).tolist(), [height] * len(low), "o", color=_RED, markersize=6)
    axis.set_ylim(bottom=2 * height)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_title(f"{z.numel():,} weights, {len(low)} levels")
    unit = "deviations from the mean" if layer.code[0] == "thermometer" else "root mean squares"
    axis.set_xlabel(f"$W$, in {unit}" + (" of its channel" if layer.per_channel else ""))


def _standardized(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Weights z (G, K), levels (G, L) and the cuts between them (G, L - 1), in the unit of each of G groups: a channel,
    or all of them where not per channel.
    """
    (of_weights, _), us, alphas = layer.code, layer.us, layer.alphas().t()
    W = layer.weight.reshape(len(alphas), -1)
    if of_weights == "thermometer":
        mean = W.mean(1, keepdim=True)
        spread = W.std(1, keepdim=True) if W.shape[1] > 1 else torch.zeros_like(mean)
        alphas = alphas[:, us.argsort(descending=True, stable=True)]
    else:
        mean, spread = W.new_zeros(len(W), 1), W.square().mean(1, keepdim=True).sqrt()
    spread = spread.clamp(min=torch.finfo(W.dtype).tiny)
    M = alphas.shape[1]
    if of_weights == "binary":
        signs = torch.cartesian_prod(*[W.new_tensor([-1, 1])] * M)
    else:  # the lowest level has all bases at -1; from there up they turn to +1 in the order of their shifts
        signs = 2 * W.new_ones(M + 1, M).tril(-1) - 1
    levels = (alphas @ signs.t() - mean) / spread
    if of_weights == "thermometer" or not layer.nearest:
        cuts = -us.sort(descending=True).values.expand(len(W), -1)
    else:
        levels = levels.sort(1).values
        cuts = (levels[:, 1:] + levels[:, :-1]) / 2
    return (W - mean) / spread, levels, cuts


def _tiles(layer: nn.Module, count: int = 3) -> list[list[tuple[Tensor, str, str]]]:
    """Rows of (2-D image in [-1, 1], name, scale): of a few kernels W, B_1..B_M, Wq."""
    if isinstance(layer, abcnets.PackedLayer):
        W, B, alphas = None, layer.unpack(), layer.alphas
        Wq = torch.einsum("mo,mo...->o...", alphas, B)
    else:
        W, B, Wq = layer.weight, layer.bases(), layer.quantized_weight()
        alphas = layer.alphas().expand(-1, len(W))
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
        return x

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


def _draw_staircase(axis, vs: Tensor, betas: Tensor, code: str, zero: bool, input: Tensor | None) -> None:
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
    R = torch.cat([torch.linspace(low, high, 400, device="cpu"), thresholds]).sort().values
    Aq = abcnets.quantize_activation(R, vs, betas, code, zero)
    axis.plot(R.tolist(), R.tolist(), color=_GREY, linestyle="-", linewidth=1.2, label="$R$")
    axis.step(R.tolist(), Aq.tolist(), where="post", color=_BLUE, linestyle="-",
              label="$A_q - A_q(0)$" if zero else "$A_q$")  # fmt: skip
    for t in thresholds.tolist():
        axis.axvline(t, color=_DARK, linestyle="--", linewidth=1)
    room = 0.15 * (Aq.max() - Aq.min()).abs().item() + 0.1
    axis.set_xlim(low, high)
    axis.set_ylim(Aq.min().item() - room, Aq.max().item() + room)
    axis.set_title(f"activations, {len(vs) + 1} levels" + (", over the layer's input" if input is not None else ""))
    axis.set_xlabel("$R$")
    axis.legend(loc="lower right", frameon=True, facecolor="white", framealpha=0.9, edgecolor="none")


@torch.no_grad()
def numerals():
    """What a code makes of the same bits: a thermometer beside a numeral, as a matplotlib Figure.

    - For 2 and 3 bases the levels of a thermometer, M + 1, and those of the binary code, 2^M, fitted to a unit Gaussian
      (the bell behind them). The lamps at the height of a level are its bases, full where they are +1.
    - The squared error that is left of the Gaussian, against the bits a weight, which are the popcounts that a word of
      weights costs with each activation base.

    Raises: ImportError without matplotlib.
    """
    plt = _pyplot()
    codes = {"thermometer": (_BLUE, 7, -5), "uniform": (_GREEN, 7, 5), "binary": (_RED, 4, 0)}
    quantiles = (torch.arange(20_000, dtype=torch.float64, device="cpu") + 0.5) / 20_000
    points = torch.special.ndtri(quantiles)
    with plt.rc_context(_LOOK):
        figure, (lamps, errors) = plt.subplots(1, 2, figsize=(10.5, 3.6), width_ratios=[6.4, 3.6], layout="constrained")
        x = 0.0
        for M in (2, 3):
            for code in ("thermometer", "binary"):
                x += 0.45 * M
                _draw_lamps(lamps, x, code, codes[code][0], *_fitted(points, code, M))
                x += 1.5
        lamps.set(xlim=(0, x - 0.2), ylim=(-2.6, 3.6), xticks=[], yticks=range(-2, 3), ylabel="level of a weight")
        lamps.spines[["bottom", "left"]].set_visible(False)
        for code, (colour, most, label) in codes.items():  # up to how many bases, and how much higher the label stands
            counts = range(1, most + 1)
            left = [(points - _fitted(points, code, M)[1]).square().mean().item() for M in counts]
            errors.plot(counts, left, "o-", color=colour, markersize=4)
            errors.annotate(code, (most, left[-1]), xytext=(6, label), textcoords="offset points", va="center",
                            color=colour)  # fmt: skip
        errors.set(yscale="log", xlim=(0.7, 8.7), xticks=range(1, 8), title="squared error left of a Gaussian",
                   xlabel="bits a weight = popcounts for each activation base")  # fmt: skip
        errors.set_yticks([0.01, 0.03, 0.1, 0.3], ["1 %", "3 %", "10 %", "30 %"])
        errors.minorticks_off()
        plt.close(figure)  # a notebook shows what is returned, once
    return figure


def _fitted(points: Tensor, code: str, M: int) -> tuple[Tensor, Tensor]:
    """The bases (M, K), the first to turn to +1 first, and Wq (K,) of K weights."""
    thresholds = 2**M - 1 if code == "binary" else M
    us = abcnets.gaussian_shifts(thresholds).flip(0)
    bases, Wq = (make(points[None], us, code=code) for make in (abcnets.weight_bases, abcnets.quantize_weight))
    return bases[:, 0], Wq[0]


def _draw_lamps(axis, x: float, code: str, colour: str, bases: Tensor, Wq: Tensor) -> None:
    """A number line at x with the levels on it, and at the height of each its bases as lamps, left of the line."""
    heights = torch.linspace(-2.6, 2.6, 200, device="cpu")
    axis.fill_betweenx(heights.tolist(), x, (x + 0.8 * (-heights.square() / 2).exp()).tolist(), color=_PALE, lw=0)
    axis.plot([x, x], [-2.6, 2.6], "-", color=_GREY, linewidth=1)
    levels = Wq.unique()  # ascending, as the weights are
    rows = bases[:, torch.searchsorted(Wq, levels)].t()
    for level, row in zip(levels.tolist(), rows.tolist()):
        axis.plot([x - 0.3 * len(row) - 0.05, x + 0.8], [level, level], "-", color=_GREY, lw=0.7, zorder=1)
        axis.plot([x], [level], "D", color=colour, markersize=4)
        for place, sign in enumerate(row):
            axis.plot([x - 0.3 * (len(row) - place)], [level], "o", markersize=8, markeredgecolor=colour,
                      markerfacecolor=colour if sign > 0 else "white")  # fmt: skip
    axis.text(x, 2.75, f"{code}\n{len(row)} bits, {len(levels)} levels", ha="center", va="bottom")


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


# --------------------------------------------------------------------------- For notebooks


def tiles(*rows, limits: tuple[float, float] | None = None, size: float = 0.95):
    """Rows of small images, each row named on its left, as a matplotlib Figure.

    Args:
        *rows: (name, images) or (name, images, captions): images (H, W), (1, H, W) or, in colour, (3, H, W) from 0 to
            1; captions above them. A row without images is left out.
        limits: what is black and what is white; None: the least and the greatest of each row.
        size: of a tile, in inches.

    Raises: ValueError where no row has an image.
    """
    plt, rows = _pyplot(), [row for row in rows if len(row[1])]
    if not rows:
        raise ValueError("tiles needs a row with at least one image, got none")
    columns = max(len(images) for _, images, *_ in rows)
    captioned = any(len(row) > 2 for row in rows)
    widest = max(len(line) for name, *_ in rows for line in name.split("\n"))
    extent = size * columns + 0.09 * widest, (size + 0.35 * captioned) * len(rows)
    with plt.rc_context({**_LOOK, "axes.titlelocation": "center"}):
        figure, axes = plt.subplots(len(rows), columns, figsize=extent, squeeze=False, layout="constrained")
        for (name, images, *captions), line in zip(rows, axes):
            images = [torch.as_tensor(image).detach().float().cpu() for image in images]
            low, high = limits or (min(i.min().item() for i in images), max(i.max().item() for i in images))
            for axis in line:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            for axis, image, caption in zip(line, images, captions[0] if captions else [""] * columns):
                image = image.movedim(0, -1).squeeze(-1) if image.ndim == 3 else image
                axis.imshow(image.numpy(), cmap="gray", vmin=low, vmax=high)
                axis.set_title(caption, fontsize=7.5 if size < 1.2 else 10)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        plt.close(figure)  # it is shown where it is returned to, once
    return figure


def show(figure, path: str | Path, alt: str) -> None:
    """Write a figure as PNG to `path` and display it in a notebook, with `alt` for those who do not see it.

    page.py, like nbconvert, takes the words from the output's metadata. The figure is closed: it shows once.
    """
    from IPython.display import display
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight", dpi=150)
    image = Image.open(drawn).convert("RGB")
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=200).save(small, format="png", optimize=True)
    Path(path).write_bytes(small.getvalue())
    _pyplot().close(figure)
    about = {"alt": alt, "width": round(0.6 * image.width)}  # 90 pixels an inch, and the more on a finer screen
    display({"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": alt},
            metadata={"image/png": about}, raw=True)  # fmt: skip


def has_reader() -> bool:
    """Whether this notebook runs in front of somebody, and not from top to bottom by a program such as nbconvert."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))  # front ends offer to ask their user, nbclient does not


def _pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from None
    return plt

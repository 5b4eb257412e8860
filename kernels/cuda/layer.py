"""What the CUDA kernels read besides activations: a layer's weights and constants, laid out once and kept.

`layout.py` says what the contract's tensors look like and which algebra counts with bits; this file adds what the GPU
wants. Everything is brought to two spatial dimensions first: a linear layer is a 1 x 1 convolution of a 1 x 1 image, a
1-D one has height 1.

    words_BHWPN     int64    the contract's activation words, with height and width
    weights_MOTP    int64    weight words, one 64-channel word p of tap t = kh * KW + kw
    weight_rows     uint32   (M, O', steps, 2, 4): K bits of a channel in granules of 128, for the tensor cores

The tensor cores count popcount(a & w), so that a padded tap, all zeros, counts nothing (and AND is what they have).
With V the number of a pixel's taps that lie inside the image, C channels, and sums over those taps and channels:

    sum (2a - 1)(2w - 1) = 4 popc(a & w) - 2 popc(a) - 2 popc(w) + C V
    y = sum_mn 4 alpha_m beta_n (popc(a_n & w_m) - k)  -  (sum_m alpha_m) S  +  constant[border class]
    S = sum_n beta_n (2 popc(a_n) - C V)                        once a pixel, whatever the output channel
    constant = bias + (sum_n beta_n) sum_m alpha_m (4 k - 2 popc(w_m))      once a border class and output channel
               - zero sum_m alpha_m (2 popc(w_m) - C V)                     where the layer's zero stays zero

k = C T / 4, about what is counted, cancels again: it spares float32 the difference of two large numbers.

Granules. A granule is what one row of `ldmatrix` takes: 128 channels of one tap. A layer of at most 64 channels would
leave half of it empty, so where its kernel is wider than 1 each granule holds two taps: a pixel and its right
neighbour. For 3 x 3 that is 6 granules instead of 9.
"""

import weakref
from functools import cached_property

import numpy as np
import torch

from ..cache import Recent
from ..layout import Geometry, border_constants, class_constants, ones_of, weight_words, words_of
from .kept import Kept, refuse_while_capturing

PADDED_TO = 128  # output channels, for the tensor cores: every tile of theirs divides it
SIZES_PER_LAYER = 16
NUMBERS_PER_SIZE = 64  # by batch and tile; some ten bytes each
BATCHES_PER_SIZE = 4  # of which zeros are kept, a float a pixel


class Layer:
    """A packed convolution with groups = 1 and two spatial dimensions, and what each rung needs of it.

    Args: as those of abcnets::packed_conv, for 0, 1 or 2 spatial dimensions.
    """

    def __init__(self, bits, alphas, betas, bias, zero, channels, stride, padding, dilation):
        self.dims = bits.ndim - 3
        if self.dims > 2:
            raise ValueError("the CUDA kernels know up to two spatial dimensions")
        ones = (1,) * (2 - self.dims)
        self.M, self.O = bits.shape[:2]
        self.N = len(betas)
        self.C, self.P = channels, words_of(channels)
        self.KH, self.KW = (*ones, *bits.shape[2:-1])
        self.stride = (*ones, *stride)
        self.dilation = (*ones, *dilation)
        self.padding = (0, 0) * len(ones) + tuple(padding)  # top, bottom, left, right
        self.device = bits.device
        self.kept = Kept()
        self.alphas_MO, self.betas_N = self.copy(alphas), self.copy(betas)
        none = torch.zeros(self.O, dtype=torch.float32, device=self.device)
        self.bias_O = self.copy(none if bias is None else bias)
        self.zero = None if zero is None else self.copy(zero)
        self._words_MOTP = weight_words(bits.cpu().numpy(), 1, self.C)
        self.center_xor = self.C * self.KH * self.KW // 2
        self.center_and = self.C * self.KH * self.KW // 4
        self.no_flips = self.kept.add(torch.zeros(1, dtype=torch.uint8, device=self.device))
        self._places = Recent(SIZES_PER_LAYER)
        self._tiles = {}

    def copy(self, tensor, dtype=torch.float32) -> torch.Tensor:
        """A copy: what is kept beside a tensor must not keep it alive."""
        return self.kept.add(tensor.detach().to(dtype, copy=True).contiguous())

    @cached_property
    def _on_host(self) -> tuple:
        """alphas, betas, bias and the zero level in NumPy."""
        numbers = self.alphas_MO, self.betas_N, self.bias_O, self.zero
        return tuple(None if t is None else t.cpu().numpy() for t in numbers)

    @cached_property
    def weights_MOTP(self) -> torch.Tensor:
        return self._upload(self._words_MOTP.view(np.int64))

    def _upload(self, array) -> torch.Tensor:
        refuse_while_capturing()
        return self.kept.add(torch.from_numpy(np.ascontiguousarray(array)).to(self.device))

    def place(self, height: int, width: int) -> "Place":
        """The layer on images of one size, for a kernel that is launched now."""
        self.kept.read()
        return self._places.get((height, width), Place, self, height, width)

    # ------------------------------------------------------------------ for the tensor cores

    @cached_property
    def pairs(self) -> bool:
        """Whether a granule holds a pixel and its right neighbour."""
        return self.C <= 64 and self.KW > 1 and self.dilation[1] == 1

    @cached_property
    def granules_per_pixel(self) -> int:
        return -(-self.P // 2)

    @cached_property
    def granule_taps(self) -> list:
        """[(kh, kw, granule of the pixel)] in the order of the K bits of a weight row."""
        columns = range(0, self.KW, 2) if self.pairs else range(self.KW)
        return [(kh, kw, g) for kh in range(self.KH) for kw in columns for g in range(self.granules_per_pixel)]

    @cached_property
    def steps(self) -> int:
        """How many steps of 256 bits, two granules, K takes."""
        return -(-len(self.granule_taps) // 2)

    @cached_property
    def padded_O(self) -> int:
        """O as the tensor cores see it: rounded up so that every tile divides it; the added channels are zeros."""
        return -(-self.O // PADDED_TO) * PADDED_TO

    @cached_property
    def weight_rows(self) -> np.ndarray:
        """uint32 (M, O', steps, 2 granules, 4): rows of K bits, zeros in the gaps."""
        rows = np.zeros((self.M, self.padded_O, 2 * self.steps, 2), np.uint64)
        words = self._words_MOTP.reshape(self.M, self.O, self.KH, self.KW, self.P)
        for k, (kh, kw, g) in enumerate(self.granule_taps):
            if self.pairs:
                granule = words[:, :, kh, kw : kw + 2, 0]
            else:
                granule = words[:, :, kh, kw, 2 * g : 2 * g + 2]
            rows[:, : self.O, k, : granule.shape[-1]] = granule
        return rows.view(np.uint32).reshape(self.M, self.padded_O, self.steps, 2, 4)

    @cached_property
    def rows(self) -> torch.Tensor:
        """The weight rows on the device, int32."""
        return self._upload(self.weight_rows.view(np.int32))

    def tiles(self, width: int, arrange) -> torch.Tensor:
        """The weight rows in tiles of `width` channels, each reordered by `arrange` (M, tiles, width, steps, 2, 4)."""
        key = width, arrange
        if key not in self._tiles:
            rows = self.weight_rows.reshape(self.M, -1, width, self.steps, 2, 4)
            self._tiles[key] = self._upload(arrange(rows).view(np.int32))
        return self._tiles[key]

    @cached_property
    def scales(self) -> tuple:
        """(4 alpha (M, O'), sum_m alpha (O',))."""
        alphas = torch.nn.functional.pad(self.alphas_MO, (0, self.padded_O - self.O))
        return self.kept.add((4 * alphas).contiguous()), self.kept.add(alphas.sum(0))


class Place:
    """What depends on the image's size: geometry, border classes, tables for the tensor cores."""

    def __init__(self, layer: Layer, height: int, width: int):
        self.layer = weakref.proxy(layer)  # which holds this place
        self.height, self.width = height, width
        self.geometry = Geometry.of((height, width), (layer.KH, layer.KW), layer.stride, layer.padding, layer.dilation)
        _, self.out_height, self.out_width = self.geometry.output
        _, self.padded_height, self.padded_width = self.geometry.padded
        self.out_pixels = self.out_height * self.out_width
        self._numbers, self._no_poison = Recent(NUMBERS_PER_SIZE), Recent(BATCHES_PER_SIZE)

    def keep(self, key, make, *arguments):
        """make(*arguments), computed once for each key."""
        return self._numbers.get(key, make, *arguments)

    @cached_property
    def classes(self) -> torch.Tensor:
        """int32 (output pixels,): each one's border class."""
        return self.layer._upload(self.geometry.border_classes[1].astype(np.int32))

    @cached_property
    def constants_xor(self) -> torch.Tensor:
        """float32 (classes, O), bias included, for kernels that count popc(a ^ w) over all taps, padded ones as a = 0.

        y = constant - 2 sum_mn alpha_m beta_n (popc(a_n ^ w_m) - k), k = C T / 2.
        """
        layer, outside_GT = self.layer, self.geometry.border_classes[0]
        return layer._upload(border_constants(layer._words_MOTP, *layer._on_host, outside_GT, layer.C))

    @cached_property
    def constants_and(self) -> torch.Tensor:
        """float32 (classes, O'), bias included: the constant of the algebra above."""
        layer, inside_TG = self.layer, ~self.geometry.border_classes[0].T
        products_MOG = 4 * layer.center_and - 2 * ones_of(layer._words_MOTP) @ inside_TG.astype(np.int64)
        return layer._upload(np.pad(self._constants(products_MOG), ((0, 0), (0, layer.padded_O - layer.O))))

    @cached_property
    def constants_inside(self) -> torch.Tensor:
        """float32 (classes, O): bias and level of zero, for kernels that count over the taps inside the image alone."""
        layer, classes = self.layer, len(self.geometry.border_classes[0])
        return layer._upload(self._constants(np.zeros((layer.M, layer.O, classes))))

    def _constants(self, products_MOG) -> np.ndarray:
        layer = self.layer
        sums_MOT, inside_GT = 2 * ones_of(layer._words_MOTP) - layer.C, ~self.geometry.border_classes[0]
        return class_constants(products_MOG, sums_MOT, *layer._on_host, inside_GT)

    def no_poison(self, batch: int) -> torch.Tensor:
        """float32 (B, H, W) zeros: what goes with words that come without poison (see rung1_pack.py)."""
        return self._no_poison.get(batch, self._zeros, batch)

    def _zeros(self, batch):
        zeros = torch.zeros(batch, self.height, self.width, dtype=torch.float32, device=self.layer.device)
        return self.layer.kept.add(zeros)

    @cached_property
    def taps(self) -> torch.Tensor:
        """int32 (T,): how many padded pixels each tap lies behind the window's first."""
        return self.layer._upload(self.geometry.taps.astype(np.int32))

    def band(self, batch: int, tile_height: int) -> int:
        """The most padded pixels, first to last in memory, that the windows of `tile_height` output pixels span."""
        return self.keep(("band", batch, tile_height), self._band, batch, tile_height)

    def _band(self, batch, tile_height):
        starts = self.geometry.output_pixels
        per_image = self.padded_height * self.padded_width
        count = batch * len(starts)
        first = np.arange(0, count, tile_height)
        last = np.minimum(first + tile_height, count) - 1
        first, last = (p // len(starts) * per_image + starts[p % len(starts)] for p in (first, last))
        return int((last - first).max()) + int(self.geometry.taps.max()) + 1

    def granule_offsets(self, pixel_words: int) -> torch.Tensor:
        """int32 (2 steps + 2,): bytes from a window's first pixel to each granule, `pixel_words` words a pixel.

        Granules beyond the last one have zero weights: they may point anywhere, here at the window's first pixel.
        """
        layer = self.layer
        offsets = np.zeros(2 * layer.steps + 2, np.int32)
        for k, (kh, kw, g) in enumerate(layer.granule_taps):
            pixel = kh * layer.dilation[0] * self.padded_width + kw * layer.dilation[1]
            offsets[k] = 4 * (pixel * pixel_words + 4 * g)
        return layer._upload(offsets)

    def output(self, batch: int) -> torch.Tensor:
        """An empty float result, (B, O, H', W') in torch's default order.

        Not channels_last: eight neighbouring threads of a tensor-core tile hold eight neighbouring pixels of one
        channel, which is a full 32-byte sector; and it is what the operator promises to torch.compile.
        """
        shape = batch, self.layer.O, self.out_height, self.out_width
        return torch.empty(shape, dtype=torch.float32, device=self.layer.device)

    def output_words(self, batch: int, bases: int) -> torch.Tensor:
        """An empty result in bits, (B, H', W', ceil(O / 64), N')."""
        shape = batch, self.out_height, self.out_width, words_of(self.layer.O), bases
        return torch.empty(shape, dtype=torch.int64, device=self.layer.device)

"""Packed layouts, in one place and in plain NumPy: how bits, thresholds and constants lie in memory for the engines.

The algebra (two operands in {-1, +1} stored as bits, a for activations and w for weights, K of them):

    sum of products = K - 2 popcount(a ^ w)

A padded tap is neither +1 nor -1, but in memory it is the word 0. Such a tap adds K_tap - 2 popcount(w_tap) too much,
a number that depends on the weights and on WHICH taps are padded, not on the image. Output pixels with the same padded
taps form a border class; there are at most 9 of them for a 3 x 3 kernel with padding 1. So borders cost no masks: one
small table of constants per class and output channel, to which the bias is added for free.

A layer whose zero stays zero convolves A - zero, inside the image alone. It is linear, so that is a constant too:

    constant[class, o] -= zero sum_m alpha_m[o] (sum over the class's inside taps, and the group's channels, of B_m[o])

Codes. A base is one threshold's comparison p_t = [x >= t_t] (thermometer: as many thresholds as bases), or, with
2^N - 1 ascending thresholds, a bit of how many comparisons come true (binary code, highest bit first). Adding one turns
round bit k whenever the count passes a multiple of 2^k, so that bit is the XOR of every 2^k-th comparison. The odd
multiples of 2^k are its own, and the even ones are the bit before; so base n is the running XOR of what
`own_thresholds` names, and each comparison is made once:

    N = 2:   hi = p_2,   lo = hi ^ p_1 ^ p_3           N = 3:   p_4,   ^ p_2 ^ p_6,   ^ p_1 ^ p_3 ^ p_5 ^ p_7

In a falling channel (flips) all p are turned round, and so is every base: an XOR of an odd number of them. Where the
thresholds really ascend, as they do but for tables made by hand, a search finds the count with fewer comparisons: with
p_4 first, then with p_6 or p_2, and so on (`rising`).

Uniform levels. Where all betas are equal, only the sum of E_n = popcount(a_n ^ w) counts, and fewer words say it:

    N = 2:   E_1 + E_2       = 2 popcount((a_2 ^ w) | d) - popcount(d),        d = a_1 ^ a_2
    N = 3:   E_1 + E_2 + E_3 = 2 popcount(carry ^ w) + popcount(sum ^ w),      carry = majority of a_n, sum = their XOR

Where two bases differ, one of them differs from w, whatever w is. Three bits a_n ^ w are added by a full adder, whose
carry and sum turn round with its inputs. Both hold bit by bit, for bases of any code and order, nested or not, and
where all a_n are 0, as in padding, so are these words. popcount(d) over a window is the same for all output channels.

Equal alphas. Two weight bases of one scale are weights -2, 0 and 2, and likewise counted once, where they agree:

    E_1 + E_2 = 2 popcount((a ^ w_2) & ~d) + popcount(d),        d = w_1 ^ w_2

So they are one base of twice the scale, of which an output channel sees some channels only, as with groups.

Names of axes: B batch, S spatial, C channels, P words of 64 channels, N activation bases, T their thresholds, M weight
bases, O output channels, K the kernel's taps. Everything spatial is brought to three dimensions first (leading ones),
so that 1-D, 2-D and 3-D are one case.

    contract's words     int64 (B, *S, P, N)                     bit c % 64 of word c // 64 is channel c
    padded words         int64 [B][padded S][P][N]               the same with zero borders: CPU engine's image
                                        ...[P][2]                (d, a_2) or (carry, sum) for uniform levels
                                        of at most 16 channels   perhaps twice in a word (Lanes.repeats)
    file's weights       uint8 (M, O, *K, ceil(C / groups / 8))  bit c % 8 of byte c // 8, counted within the group
    weight words         uint64 (M, O, taps, P)                  in the input's channel words; 0 outside the group
    CPU tiles            uint{16, 32, 64} [block of O][M][tap, unit][Q][512 / bits]   one lane an output channel; a unit
                                        is as much of a channel word as a lane holds
    look-up image        uint8 [B][padded S][P][N][16]           16 times each nibble of a word (four channels), or
                         uint16 ...        [P][16]               16 (a + 16 b) of two words' nibbles: offsets of tables
    look-up tiles        uint8 [block of O][M][tap, nibble][Q][lanes]   nibbles that index these tables; 128: unseen
    image, tiles of floats   float32 [B][padded S][C], [block of O][tap, channel][Q][16]
    image, tiles in eight bits   uint8 [B][padded S][4], int32 [block of O][1 + tap][Q][16]
"""

import math
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

BLOCK = 16  # output channels that the CPU engine stores at once, and that the channels of a tile are a multiple of


def aligned_zeros(shape, dtype) -> np.ndarray:
    """np.zeros whose first byte lies on a 64-byte boundary, that is on a cache line."""
    size = prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def words_of(channels: int) -> int:
    """P, the number of 64-bit words that hold one bit a channel."""
    return -(-channels // 64)


# --------------------------------------------------------------------------- geometry


def by_rows(packed_conv, x, *layer):
    """A linear layer on floats (..., C) or words (..., P, N): `packed_conv` knows one dimension in front of these."""
    own = 1 if x.is_floating_point() else 2
    rows = packed_conv(x.reshape(-1, *x.shape[-own:]), *layer)
    return rows.reshape(*x.shape[:-own], *rows.shape[1:])


@dataclass(frozen=True)
class Geometry:
    """One convolution's (or pooling's) spatial side, in three dimensions.

    size, kernel, stride, dilation: three ints each; padding: three (low, high) pairs.
    """

    size: tuple
    kernel: tuple
    stride: tuple
    padding: tuple
    dilation: tuple

    @classmethod
    def of(cls, size, kernel, stride, padding, dilation) -> "Geometry":
        """From 0 to 3 spatial dimensions; padding as the flat (low_0, high_0, low_1, ...) of the operator."""
        ones = (1,) * (3 - len(size))
        pairs = tuple(zip(padding[::2], padding[1::2]))
        return cls(
            ones + tuple(size),
            ones + tuple(kernel),
            ones + tuple(stride),
            ((0, 0),) * len(ones) + pairs,
            ones + tuple(dilation),
        )

    @cached_property
    def padded(self) -> tuple:
        return tuple(s + low + high for s, (low, high) in zip(self.size, self.padding))

    @cached_property
    def output(self) -> tuple:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        return tuple((s - r) // step + 1 for s, r, step in zip(self.padded, reach, self.stride))

    @cached_property
    def input_pixels(self) -> np.ndarray:
        """Where each input pixel lies in the padded image, counted in pixels: (prod(size),)."""
        return self._flat([low + np.arange(s) for s, (low, _) in zip(self.size, self.padding)])

    @cached_property
    def output_pixels(self) -> np.ndarray:
        """Where each output pixel's window begins in the padded image: (prod(output),)."""
        return self._flat([np.arange(o) * step for o, step in zip(self.output, self.stride)])

    @cached_property
    def taps(self) -> np.ndarray:
        """How far each tap lies from the window's beginning: (prod(kernel),)."""
        return self._flat([np.arange(k) * d for k, d in zip(self.kernel, self.dilation)])

    def _flat(self, axes) -> np.ndarray:
        """Padded positions (d, h, w) of a grid -> flat pixel numbers."""
        d, h, w = axes
        _, height, width = self.padded
        return ((d[:, None, None] * height + h[:, None]) * width + w).reshape(-1).astype(np.int64)

    @cached_property
    def inside(self) -> list:
        """Per dimension: is tap k of output o inside the image?  bool (output_d, kernel_d)."""
        masks = []
        for s, o, k, step, d, (low, _) in zip(
            self.size, self.output, self.kernel, self.stride, self.dilation, self.padding
        ):
            position = np.arange(o)[:, None] * step + np.arange(k) * d - low
            masks.append((position >= 0) & (position < s))
        return masks

    @cached_property
    def border_classes(self) -> tuple:
        """(outside, class_of_pixel): bool (classes, taps), true where a tap is padding, and int64 (output pixels,)."""
        outside, class_of_pixel = np.zeros((1, 1), bool), np.zeros(1, np.int64)
        for mask in self.inside:  # classes of a grid are pairs of classes of its axes
            patterns, members = np.unique(~mask, axis=0, return_inverse=True)
            outside = (outside[:, None, :, None] | patterns[None, :, None, :]).reshape(
                len(outside) * len(patterns), outside.shape[1] * patterns.shape[1]
            )
            class_of_pixel = (class_of_pixel[:, None] * len(patterns) + members.reshape(-1)).reshape(-1)
        return outside, class_of_pixel

    @cached_property
    def read_pixels(self) -> np.ndarray:
        """Flat numbers of the input pixels that any window reads (a 1 x 1 kernel with stride 2 skips three of four)."""
        used = []
        for s, o, k, step, d, (low, _) in zip(
            self.size, self.output, self.kernel, self.stride, self.dilation, self.padding
        ):
            position = (np.arange(o)[:, None] * step + np.arange(k) * d - low).reshape(-1)
            used.append(np.isin(np.arange(s), position))
        d, h, w = used
        return np.flatnonzero(d[:, None, None] & h[:, None] & w)


def pool_output(size, kernel, stride, padding, dilation, ceil_mode) -> tuple:
    """The size of a pooled image, as torch counts it."""
    output = []
    for s, k, step, low, d in zip(size, kernel, stride, padding, dilation):
        room = s + 2 * low - d * (k - 1) - 1
        o = (room + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (o - 1) * step >= s + low:  # torch drops a window that begins beyond the image
            o -= 1
        output.append(o)
    return tuple(output)


def pool_sources(size, kernel, stride, padding, dilation, ceil_mode) -> tuple:
    """Which input pixels each window of a pooling holds: (output size, int64 (output pixels, taps)).

    Taps outside the image are replaced by one of the same window inside it, which neither a maximum nor an OR notices.
    The table is None if some window holds no pixel at all.
    """
    output, axes = pool_output(size, kernel, stride, padding, dilation, ceil_mode), []
    for s, o, k, step, low, d in zip(size, output, kernel, stride, padding, dilation):
        positions = np.arange(o)[:, None] * step + np.arange(k) * d - low
        inside = (positions >= 0) & (positions < s)
        if o < 1 or not inside.any(1).all():
            return output, None
        some_inside = positions[np.arange(o), inside.argmax(1)]
        axes.append(np.where(inside, positions, some_inside[:, None]))
    sources = np.zeros((1, 1), np.int64)
    for s, positions in zip(size, axes):
        sources = sources[:, None, :, None] * s + positions[None, :, None, :]
        sources = sources.reshape(sources.shape[0] * sources.shape[1], -1)
    return output, np.ascontiguousarray(sources)


def chunk_starts(pixels: np.ndarray, count: int, width: int) -> np.ndarray:
    """Starts of runs of `width` pixels that together cover `pixels` (ascending), none reaching past `count`.

    The last run is moved back where it would; a run may therefore overlap the one before it.
    """
    starts, i = [], 0
    while i < len(pixels):
        starts.append(max(min(int(pixels[i]), count - width), 0))
        i = int(np.searchsorted(pixels, starts[-1] + width))
    return np.array(starts, np.int64)


# --------------------------------------------------------------------------- weights and activations


def weight_words(bits_MOKc: np.ndarray, groups: int, channels: int) -> np.ndarray:
    """The file's bytes -> uint64 (M, O, taps, P), each group's bits moved to where its channels lie in the input."""
    M, O = bits_MOKc.shape[:2]
    per_group, P = channels // groups, words_of(channels)
    bytes_MOTc = bits_MOKc.reshape(M, O, -1, bits_MOKc.shape[-1])
    taps = bytes_MOTc.shape[2]
    if groups == 1:
        words = np.zeros((M, O, taps, P * 8), np.uint8)
        words[..., : bytes_MOTc.shape[-1]] = bytes_MOTc
        return words.view(np.uint64)
    bits_MOTC = np.zeros((M, O, taps, P * 64), np.uint8)
    unpacked = np.unpackbits(bytes_MOTc, axis=-1, count=per_group, bitorder="little")
    for outputs, inputs in group_slices(O, channels, groups):
        bits_MOTC[:, outputs, :, inputs] = unpacked[:, outputs]
    return np.packbits(bits_MOTC, axis=-1, bitorder="little").view(np.uint64)


def group_slices(O: int, channels: int, groups: int) -> list:
    """[(slice of output channels, slice of input channels)] of each group."""
    o, c = O // groups, channels // groups
    return [(slice(g * o, (g + 1) * o), slice(g * c, (g + 1) * c)) for g in range(groups)]


def channel_masks(O: int, channels: int, groups: int) -> np.ndarray:
    """uint64 (O, P): which input channels each output channel sees."""
    mask_OC = np.zeros((O, words_of(channels) * 64), np.uint8)
    for outputs, inputs in group_slices(O, channels, groups):
        mask_OC[outputs, inputs] = 1
    return np.packbits(mask_OC, axis=-1, bitorder="little").view(np.uint64)


def own_thresholds(n: int, N: int, T: int) -> range:
    """The thresholds, counted from 0, that base n of N is the XOR of: all of them, or in the binary code those besides
    the ones of base n - 1.
    """
    return range(n, n + 1) if T == N else range((1 << (N - 1 - n)) - 1, T, 1 << (N - n))


def check_thresholds(N: int, T: int) -> None:
    """Raise ValueError unless T thresholds are those of N bases in some code."""
    if T not in (N, 2**N - 1):
        raise ValueError(f"packed_conv: {N} bases have {N} thresholds or, in the binary code, {2**N - 1}; got {T}")


def flip_words(flips_C: np.ndarray) -> np.ndarray:
    """bool (C,) -> uint64 (P,), the words that turn round the channels whose comparison is turned round."""
    bits = np.zeros(words_of(len(flips_C)) * 64, np.uint8)
    bits[: len(flips_C)] = flips_C
    return np.packbits(bits, bitorder="little").view(np.uint64)


def rising(thresholds_TC: np.ndarray, N: int) -> np.ndarray | None:
    """The thresholds of a binary code, ascending in every channel; None where they are in no order, or of another code.

    In a falling channel they descend. How many are reached is the same in either order.
    """
    if len(thresholds_TC) <= N:
        return None
    ascending_TC = np.sort(thresholds_TC, axis=0)
    is_one, is_other = ((ascending_TC == order).all(0) for order in (thresholds_TC, thresholds_TC[::-1]))
    return ascending_TC if (is_one | is_other).all() else None


def threshold_table(thresholds_TC: np.ndarray, multiple: int) -> np.ndarray:
    """float32 (T, C) -> (T, C rounded up to `multiple`); the added thresholds are never reached."""
    T, C = thresholds_TC.shape
    table = np.full((T, -(-C // multiple) * multiple), np.inf, np.float32)
    table[:, :C] = thresholds_TC
    return table


def border_constants(
    words_MOTP, alphas_MO, betas_N, bias_O, zero, outside, channels_per_group, seen_OTP=None
) -> np.ndarray:
    """What each border class adds to the sum of popcounts: float32 (classes, O).

    The kernels count E = popcount(a ^ w) - floor(K / 2) over all taps, padded ones too, so that the sum of products is
    (K & 1) - 2 E less what the padded taps put in. `scales` brings -2 E; the rest is here, with the bias. Where an
    output channel sees but some channels of a tap, seen_OTP, it has fewer products than K.
    """
    O, taps = words_MOTP.shape[1:3]
    seen_OT = np.full((O, taps), channels_per_group) if seen_OTP is None else ones_of(seen_OTP)
    sums_MOT = 2 * ones_of(words_MOTP) - seen_OT
    left_O = seen_OT.sum(1) - channels_per_group * taps // 2 * 2
    products_MOG = left_O[:, None] + sums_MOT @ outside.T.astype(np.int64)  # padded taps, bits 0, were counted as -B
    return class_constants(products_MOG, sums_MOT, alphas_MO, betas_N, bias_O, zero, ~outside)


def ones_of(words_MOTP) -> np.ndarray:
    """How many channels of each tap have the weight +1: int64 (M, O, taps)."""
    return np.bitwise_count(words_MOTP).sum(-1, dtype=np.int64)


def class_constants(products_MOG, sums_MOT, alphas_MO, betas_N, bias_O, zero, inside_GT) -> np.ndarray:
    """bias + sum_m alpha_m ((sum_n beta_n) products - zero sums of the inside taps), float32 (classes, O).

    sums_MOT are those of the weight base over each tap's channels; bias and zero may be None.
    """
    values_MOG = betas_N.astype(np.float64).sum() * products_MOG
    if zero is not None:
        values_MOG = values_MOG - np.float64(zero) * (sums_MOT @ inside_GT.T.astype(np.int64))
    constants_GO = np.einsum("mo,mog->go", alphas_MO.astype(np.float64), values_MOG)
    return (constants_GO + (0 if bias_O is None else bias_O)).astype(np.float32)


def scales(alphas_MO, betas_N) -> np.ndarray:
    """float32 (M, N, O): what one count of E is worth, -2 alpha beta."""
    return (-2.0 * alphas_MO.astype(np.float64)[:, None] * betas_N.astype(np.float64)[None, :, None]).astype(np.float32)


# --------------------------------------------------------------------------- CPU tiles


def as_one_base(words_MOTP: np.ndarray, alphas_MO: np.ndarray, masks_OP: np.ndarray) -> tuple | None:
    """Two weight bases of one scale as one: (words, alphas, uint64 (O, taps, P) of what it sees); None for others."""
    if len(alphas_MO) != 2 or (alphas_MO[0] != alphas_MO[1]).any():
        return None
    seen_OTP = ~(words_MOTP[0] ^ words_MOTP[1]) & masks_OP[:, None]
    return words_MOTP[1:] & seen_OTP, 2 * alphas_MO[1:], seen_OTP


def counts_as_uniform(betas_N: np.ndarray, masked: bool, uses: int) -> bool:
    """Whether the CPU engine counts a layer by the forms for uniform levels.

    masked: whether output channels see different channels. Then not for N = 2: popcount(d) would be another for each.
    uses: how often a channel is read, M O taps / groups; 64 times or more pay for making the words.
    """
    has_form = len(betas_N) in ((3,) if masked else (2, 3))
    return has_form and uses >= 64 and bool((betas_N == betas_N[0]).all())


# What the padded image holds of a pixel (pack.py):
BASES, UNIFORM_WORDS, NIBBLES, UNIFORM_NIBBLES = range(4)  # the words of N bases, of uniform levels; nibbles of either
FLOATS = 4  # or, of a layer that stays float, its channels


def image_words(N: int, uniform: bool) -> int:
    """Words that the padded image holds for 64 channels of a pixel."""
    return 2 if uniform else N


def blocks_of(O: int, block: int = BLOCK) -> int:
    """How many blocks of 16 (or `block`) output channels."""
    return -(-O // block)


def in_blocks(values, axis: int, block: int = BLOCK) -> np.ndarray:
    """Split the output-channel axis into (blocks, block), filling up with zeros; the axis of blocks comes first."""
    O = values.shape[axis]
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, blocks_of(O, block) * block - O)
    values = np.pad(values, padding)
    values = values.reshape(*values.shape[:axis], blocks_of(O, block), block, *values.shape[axis + 1 :])
    return np.moveaxis(values, axis, 0)


def word_ranges(masks_OP: np.ndarray, block: int = BLOCK, step: int = 1) -> tuple:
    """(first of each block, width): the channel words, or units, a block of outputs sees, as equally wide ranges.

    Without groups those are all that have channels. With groups a block sees few of them, and skipping the others is
    what makes a grouped or depthwise convolution cheap. Both are multiples of `step`.
    """
    seen = in_blocks(masks_OP != 0, 0, block).any(1)  # (blocks, P)
    seen = seen.reshape(len(seen), -1, step).any(2)
    P = seen.shape[1]
    first = seen.argmax(1)
    last = P - 1 - seen[:, ::-1].argmax(1)
    width = int((last - first + 1).max())
    return step * np.minimum(first, P - width).astype(np.int64), step * width


@dataclass(frozen=True)
class Lanes:
    """How a CPU tile counts: Q registers of register_bits / bits lanes, one lane an output channel.

    A 64-bit lane holds 64 channels of one tap: of a layer with 16 channels it counts three quarters for nothing. So
    lanes are as wide as the layer is deep, and there are more of them.

    To broadcast 16 bits takes more than a load on Intel's processors, to broadcast 32 bits does not. So the words of
    an image of at most 16 channels hold these twice (repeats = 2), and 32 bits are broadcast.
    """

    bits: int = 64
    registers: int = 2
    register_bits: int = 512
    repeats: int = 1
    step = 1  # units that a step of the tile takes

    @property
    def block(self) -> int:
        """Output channels of a tile, a multiple of 16."""
        return self.register_bits // self.bits * self.registers

    @property
    def most(self) -> int:
        """The largest K whose counts fit: K less K // 2 in a lane, or K in the 16 bits behind a lane of 8."""
        return (1 << 16) - 1 if self.bits == 8 else (1 << self.bits) - 2

    def image(self, uniform: bool) -> int:
        """What the padded image holds."""
        return UNIFORM_WORDS if uniform else BASES

    def word_bytes(self, N: int, uniform: bool) -> int:
        """Of what the image holds for 64 channels of a pixel."""
        return 8 * image_words(N, uniform)

    def units(self, words: np.ndarray) -> np.ndarray:
        """uint64 (..., P) -> (..., 64 P / bits), the words in pieces of a lane."""
        return words.view(f"uint{self.bits}")

    def offsets(self, units: np.ndarray, word_bytes: int) -> np.ndarray:
        """Where units lie in a pixel whose channel words are word_bytes apart."""
        return units * self.bits // 64 * word_bytes + units * self.bits % 64 // 8

    def cost(self, masks_OP: np.ndarray) -> float:
        """Registers that a tap takes, where a register of 16 bits that are not repeated costs a fifth more.

        Broadcasting 16 bits is no load alone on Intel's processors. On ARM lanes of 64 bits take five instructions, not
        three, those of 8 bits are emptied now and then, and few registers have more broadcasts each.

        Infinity where blocks begin within words and see more than the rest of them, or channels are too many to repeat.
        """
        if self.repeats > 1 and (masks_OP.shape[1] > 1 or masks_OP.max() >> self.bits):
            return math.inf
        first, width = word_ranges(self.units(masks_OP), self.block)
        within = first * self.bits % 64
        if ((within > 0) & (within + width * self.bits > 64)).any():
            return math.inf
        price = {
            8: 1 + 0.3 / self.registers,
            16: 1.2 if self.repeats == 1 else 1,
            64: 5 / 3 if self.register_bits == 128 else 1,
        }.get(self.bits, 1)
        return len(first) * self.registers * width * price


LANES = Lanes(64, 2), Lanes(32, 1), Lanes(16, 1), Lanes(16, 1, repeats=2)  # of AVX-512
ARM_LANES = Lanes(32, 4, 128), Lanes(8, 4, 128), Lanes(8, 2, 128), Lanes(8, 1, 128), Lanes(64, 8, 128)
LONG_WINDOW = 16  # words


def choose_lanes(masks_OP: np.ndarray, taps: int, widths, lanes=LANES) -> Lanes:
    """The cheapest of the lanes that have a vector popcount (`widths`) and whose counters do not overflow.

    Of those that cost the same, 64 bits for long windows, since they need fewer broadcasts, and not for short ones,
    since 64-bit counters are slower to turn into floats.
    """
    K = taps * int(np.bitwise_count(masks_OP[0]).sum())
    fitting = [lanes for lanes in lanes if lanes.bits in widths and K <= lanes.most]
    long = taps * word_ranges(masks_OP)[1] >= LONG_WINDOW
    return min(fitting, key=lambda lanes: (lanes.cost(masks_OP), (lanes.bits == 64) != long))


def tile_weights(units_MOTU: np.ndarray, first: np.ndarray, width: int, block: int) -> np.ndarray:
    """(M, O, taps, units) -> [blocks][M][tap, unit][block], 64-byte aligned: the tile's reading order."""
    blocked_GMoTU = in_blocks(units_MOTU, 1, block)
    G, M, _, taps, _ = blocked_GMoTU.shape
    tiles = aligned_zeros((G, M, taps * width, block), units_MOTU.dtype)
    for tile, blocked_MoTU, start in zip(tiles, blocked_GMoTU, first):
        chosen_MoTu = blocked_MoTU[..., start : start + width]
        tile[...] = chosen_MoTu.reshape(M, block, taps * width).transpose(0, 2, 1)
    return tiles


# --------------------------------------------------------------------------- CPU tiles that look up


@dataclass(frozen=True)
class LookUp:
    """How a CPU tile without a vector popcount counts: Q registers of byte lanes, one lane an output channel.

    The unit is a nibble, four channels. For a nibble a of the activations, a table of 16 bytes says popcount(a ^ w) for
    each nibble w of weights. Two words share a look-up where a table has room for both: `pair`. Its entry holds

        uniform levels (N = 2; 3)    popcount(a ^ w) + popcount(b ^ w);   2 popcount(carry ^ w) + popcount(sum ^ w)
        N = 2                        popcount(a ^ w) + 16 popcount(b ^ w), two counts in a byte
    """

    lanes: int  # bytes of a register
    registers: int = 2
    step: int = 8  # nibbles that a step of the tile takes
    repeats = 1  # of a word in the image

    @property
    def block(self) -> int:
        """Output channels of a tile, a multiple of 16."""
        return self.lanes * self.registers

    def image(self, uniform: bool) -> int:
        """What the padded image holds."""
        return UNIFORM_NIBBLES if uniform else NIBBLES

    def word_bytes(self, N: int, uniform: bool) -> int:
        """Of what the image holds for 64 channels of a pixel."""
        return 32 if N == 2 or uniform else 16 * N

    def units(self, words: np.ndarray) -> np.ndarray:
        """uint64 (..., P) -> uint8 (..., 16 P), the nibbles of the words."""
        halves = words.view(np.uint8)
        return np.stack([halves & 15, halves >> 4], -1).reshape(*words.shape[:-1], -1)

    def offsets(self, units: np.ndarray, word_bytes: int) -> np.ndarray:
        """Where nibbles lie in a pixel; each base's sixteen, or the pairs', side by side."""
        return units // 16 * word_bytes + units % 16 * (2 if word_bytes == 32 else 1)


def looks_up_uniform(betas_N: np.ndarray) -> bool:
    """Whether a look-up counts all bases at once: equal betas."""
    return len(betas_N) in (2, 3) and bool((betas_N == betas_N[0]).all())


def table_weights(N: int, uniform: bool) -> tuple:
    """What popcount(a ^ w) and popcount(b ^ w) count for in a look-up's entry; (1,) where it is of one word."""
    if uniform:
        return (1, 1) if N == 2 else (2, 1)
    return (1, 16) if N == 2 else (1,)


def look_up_tables(weights: tuple) -> np.ndarray:
    """uint8 [a, or a + 16 b][w], the entries of `table_weights`."""
    counts = np.bitwise_count(np.arange(16)[:, None] ^ np.arange(16))
    tables = weights[0] * counts
    if len(weights) == 2:
        tables = (tables[None] + weights[1] * counts[:, None]).reshape(256, 16)
    return tables.astype(np.uint8)


def choose_look_up(masks_OP: np.ndarray, taps: int, N: int, uniform: bool, lanes: int) -> LookUp | None:
    """The cheapest look-up, or None where none counts this layer.

    That is where groups begin within a nibble, where 16-bit counters may overflow, and where the nibbles of a tile that
    begins within a word lie further apart than those from a word's start (groups, N >= 3).
    """
    masks_OU = LookUp(lanes).units(masks_OP)
    seen = masks_OU[:, masks_OU.any(0)]
    K = taps * int(np.bitwise_count(masks_OP[0]).sum())
    if not ((seen == seen.max(0)) | (seen == 0)).all() or K * (N if uniform else 1) >= 1 << 16:
        return None
    found = [LookUp(lanes, registers, step) for registers in (2, 1) for step in (8, 4)]

    def cost(look_up):
        """Registers a tap; few of them do not hide loads, and short steps not their bookkeeping."""
        first, width = word_ranges(masks_OU, look_up.block, look_up.step)
        within = first % 16
        if look_up.word_bytes(N, uniform) > 32 and ((within > 0) & (within + width > 16)).any():
            return math.inf
        return len(first) * look_up.registers * width * (1.25 if look_up.registers == 1 else 1) * (8 + 4 / look_up.step)

    best = min(found, key=cost)
    return best if cost(best) < math.inf else None


def hide_unseen(nibbles: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Nibbles of weights, with 128 where the mask is 0: such an index finds 0 in any table."""
    return nibbles | np.where(masks == 0, np.uint8(128), np.uint8(0))


# --------------------------------------------------------------------------- CPU tiles of floats


@dataclass(frozen=True)
class Floats:
    """How a CPU tile convolves floats, of which its image consists (cpu/floats.py): a unit is a channel.

    is_first: whether the image comes from outside;  relu: whether what is below 0 becomes 0 in it
    """

    is_first: bool
    relu: bool
    registers: int  # Q
    step = 1
    repeats = 1

    @property
    def block(self) -> int:
        """Output channels of a tile."""
        return BLOCK * self.registers

    def image(self, uniform: bool) -> int:
        """What the padded image holds."""
        return FLOATS

    def offsets(self, units: np.ndarray, word_bytes: int) -> np.ndarray:
        """Where channels lie in a pixel."""
        return units * word_bytes


class Bytes(Floats):
    """The same in eight bits (cpu/eight_bits.py): a unit is a pixel, of at most four channels."""


def float_weights(weight_OCK: np.ndarray, block: int) -> np.ndarray:
    """float32 (O, C, *K) -> [blocks][tap, channel][block], 64-byte aligned: the tile's reading order."""
    O, C = weight_OCK.shape[:2]
    blocked_GOk = in_blocks(weight_OCK.reshape(O, C, -1).swapaxes(1, 2).reshape(O, -1), 0, block)
    tiles = aligned_zeros((*blocked_GOk.shape[::2], block), np.float32)
    tiles[...] = blocked_GOk.swapaxes(1, 2)
    return tiles


def byte_weights(weight_OCK: np.ndarray, block: int) -> np.ndarray:
    """int8 (O, C, *K), C at most 4 -> int32 [blocks][1 + tap][block], 64-byte aligned: the tile's reading order.

    First where the sums begin, as activations are read 128 too large; then four channels' weights of each tap.
    """
    O, C = weight_OCK.shape[:2]
    weight_OKC = weight_OCK.reshape(O, C, -1).swapaxes(1, 2)
    pixels_OK = np.ascontiguousarray(np.pad(weight_OKC, [(0, 0), (0, 0), (0, 4 - C)])).view(np.int32)[..., 0]
    starts_O = -128 * weight_OCK.reshape(O, -1).astype(np.int32).sum(1, dtype=np.int32)
    blocked_GOk = in_blocks(np.concatenate([starts_O[:, None], pixels_OK], 1), 0, block)
    tiles = aligned_zeros((*blocked_GOk.shape[::2], block), np.int32)
    tiles[...] = blocked_GOk.swapaxes(1, 2)
    return tiles

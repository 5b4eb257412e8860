"""What one call hands to the CPU kernels: a C struct that Numba reads by name.

Each thread of a team (team.py) is given the same pointer, so everything a call needs, sizes, addresses and strides,
stands in one record. Every field is a 64-bit integer; strides and offsets are in bytes.
"""

import ctypes

import numpy as np

PLANAR = 0  # float32 (B, C, *S): a channel's pixels lie side by side
INTERLEAVED = 1  # float32 (B, *S, C), torch's channels_last: a pixel's channels lie side by side
WORDS = 2  # packed words (B, *S, P, N)
LANDED = 3  # words that lie in the padded image already

PIXEL_BLOCK = 64  # output pixels between two visits to memory: the rows of one block stay in the first-level cache
CHUNK = 16  # input pixels that are packed at once: the floats in one 512-bit register

PART_BYTES = (PIXEL_BLOCK + 8) * 16 * 4  # scratch of one thread: [pixel][16 output channels] results before they are
#                                          stored, and a little more, since the last tile may reach past the block,
ROWS_BYTES = 8 * PART_BYTES  # of the at most 128 channels of a tile;
PLANE_BYTES = 64 * CHUNK * 4  # [64 channels][pixel] a copy of the input where an image has fewer pixels than a chunk;
COLUMN_BYTES = 8 * CHUNK * 8  # [base][pixel] the words that a chunk was packed to, before they are sent to pixels;
COUNTERS = ROWS_BYTES + PLANE_BYTES + COLUMN_BYTES  # where 16-bit counters begin, of a tile that counts in bytes,
COUNTERS_BYTES = 24 * 64 * 2  # of at most 24 registers
ADDED = COUNTERS + COUNTERS_BYTES  # where the image lies that is added to the one under way
SCRATCH_BYTES = ADDED + 64


class Job(ctypes.Structure):
    """One call. Tables belong to the plan, input and output to the caller, words and scratch to the workspace."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "address",  # of this record, to hand it on
            # input: images x channels x pixels
            "input",
            "input_kind",
            "input_by_thread",  # 1: `input` has one image for each thread, as words_by_thread
            "images",
            "channels",
            "image_stride",
            "channel_stride",
            "pixel_stride",
            "pixels",
            "bases",  # N
            "channel_words",  # P
            "thresholds",  # float32 [T][64 P]
            "flips",  # words [P]
            "chunks",  # first pixel of every chunk to pack
            "chunk_count",  # of one image; 0 where the input is used as it lies
            "landing",  # which pixel of the padded image each input pixel is
            # the padded image of words (of a float layer: floats)
            "words",
            "pixel_bytes",  # from one pixel of it to the next
            "words_stride",  # from one padded image to the next
            "words_by_thread",  # 1: a thread has one padded image and reuses it; 0: each image has its own
            "repeat",  # a word times this is what the image holds (layout.Lanes)
            "counted",  # word: the channels of a word of the image that are counted once
            "image_scale",  # of a float layer in eight bits: from an image's words to the size of its step, a float32
            "differing",  # int32 [padded pixel] from an image's words to its popcounts of d (layout.py); 0: not needed
            "chunk_kernel",  # address of pack.chunk_kernel, or floats' or eight_bits'
            # convolution
            "block_kernel",  # address of vector.block_kernel(N, uniform, masked, lanes), or of another tile's
            "parts",  # of 16 output channels that a tile has
            "tiles",  # of output channels
            "weights",  # units [tile][M][tap, unit][16 parts], or nibbles
            "masks",  # units [tile][tap, unit][16 parts], or 0 where all see all channels
            "tile_units",  # where a tile's first unit lies in a pixel, [tile]
            "tap_offsets",  # where tap and unit (or step of nibbles) lie, from the window's beginning, [tap, unit]
            "tap_count",
            "window_taps",  # how many pixels each tap lies from the window's beginning
            "window_tap_count",
            "window_count",  # one more than the last pixel that a window begins at
            "start",  # -(K // 2), where the popcounts begin
            "weight_bases",  # M
            "scales",  # float32 [tile][M][N][16 parts]
            "constants",  # float32 [class][tile][16 parts]
            "windows",  # the pixel of the padded image that each output pixel's window begins at
            "pixel_classes",  # where each output pixel's constants begin
            "blocks",  # of 16 output channels that are stored
            "output_pixels",
            # output
            "output",
            "output_stride",  # from one image to the next
            "output_by_thread",  # as words_by_thread
            "other",  # float32 [image][channel][pixel] that are added to the output; 0: nothing is
            "other_stride",
            "other_by_thread",
            "output_channels",  # O
            "output_thresholds",  # float32 [T of the next layer][block][16]
            "output_flips",  # words [ceil(O / 64)]
            "output_landing",  # which pixel of the next image each output pixel is, where bits go out,
            "output_pixel_bytes",  # and from one pixel of that image to the next
            "store_kernel",  # address of store.store_kernel(kind, what the next layer reads)
            # threads
            "scratch",  # of each thread: SCRATCH_BYTES, then int32 [window] sums of `differing`
            "scratch_stride",
            # result
            "saw_nan",
        )
    ]


JOB_DTYPE = np.dtype(Job)


class PoolJob(ctypes.Structure):
    """One max-pooling, of words or of floats; or averaging of floats."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "address",  # of this record
            "input",  # words [image][pixel][P][N], or float32 [image][pixel][channels], averaged: [channels][pixel]
            "input_stride",  # from one image to the next
            "input_by_thread",  # 1: one image for each thread, 0: one for each image
            "output",  # words [image][pixel][P][N], or float32 [image][channels][pixel]
            "output_stride",
            "output_by_thread",
            "output_landing",  # which pixel of the next image each output pixel of words is,
            "output_pixel_bytes",  # and from one pixel of that image to the next
            "images",
            "output_pixels",
            "channels",
            "channel_words",  # P
            "flips",  # words [P]
            "input_pixels",  # averaged:
            "extra",  # channels of zeros behind the others
            "scales",  # float32 [scale, shift][channels], or 0
            "sources",  # input pixel of each [output pixel][tap]
            "taps",
            "kernel",  # address of pool.words_kernel() or pool.floats_kernel()
        )
    ]


POOL_JOB_DTYPE = np.dtype(PoolJob)


CONVOLUTION, POOL = 0, 1  # kinds of steps


class ChainJob(ctypes.Structure):
    """Layers and pools that run one after the other in one call."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "steps",
            "kinds",  # [step] CONVOLUTION or POOL
            "jobs",  # [step] the address of its Job or PoolJob
            "images",
            "by_thread",  # 1: a thread takes an image through all steps; 0: all threads share out each step
            "scratch",  # of each thread, as in Job
            "scratch_stride",
            "saw_nan",
        )
    ]


CHAIN_JOB_DTYPE = np.dtype(ChainJob)


STAIRCASE_BLOCK = 2048  # elements that are summed in float32: 128 in each lane of a register
STAIRCASE_SCRATCH_BYTES = 3 * 64 + 128  # a thread's: the last elements of R, G and dL/dR, of sixteen in each; a block's
#                                         float32 sums, of up to 15 thresholds


class StaircaseJob(ctypes.Structure):
    """One pass of the activation quantizer, forward or backward."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "input",  # R, [count] in the order in which it lies in memory
            "gradient",  # G, or 0 forward
            "output",  # Aq or dL/dR
            "count",
            "zero",  # 1: an R of 0 moves nothing
            "exact",  # 1: a half step is infinite or NaN
            "thresholds",  # float32 [T], ascending for the forward pass
            "levels",  # [T + 1] and NaN, of the output's kind; or 0 backward
            "half_steps",  # float32 [T], or 0 forward
            "sums",  # float64 [thread][T near, T above, 1], or 0 forward
            "sums_stride",  # from one thread's sums to the next
            "scratch",  # STAIRCASE_SCRATCH_BYTES a thread
        )
    ]


STAIRCASE_JOB_DTYPE = np.dtype(StaircaseJob)


class LevelsJob(ctypes.Structure):
    """One call of the weights' quantizer. G channels, or one group of all weights, have T thresholds each."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "W",  # float32 [G][size]
            "Wq",  # float32 [G][size]
            "groups",  # G
            "size",
            "us",  # float32 [T], descending
            "threshold_count",  # T
            "bases",  # M
            "design",  # float32 [T + 1][scale_count]: levels = design @ scales; or 0 for a thermometer
            "scale_count",  # M, or 1 for uniform levels; 0 for a thermometer
            "rounds",  # how often thresholds are put midway and levels fitted again
            "centres",  # float32 [G]
            "spreads",  # float32 [G]
            "alphas",  # float32 [G][M]
            "levels",  # float32 [G][T + 1]
            "thresholds",  # float32 [G][T]
        )
    ]


LEVELS_JOB_DTYPE = np.dtype(LevelsJob)

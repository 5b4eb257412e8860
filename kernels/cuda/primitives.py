"""The few PTX words that the CUDA kernels are written in, each in two forms: for the device and for the simulator.

Numba speaks no tensor core, no `ldmatrix`, no `cp.async`. On the device these words are inline PTX (ptx.py); under
NUMBA_ENABLE_CUDASIM=1 the same names are plain Python (simulator.py). A kernel written in them runs unchanged in both.

Operands are (array, index) pairs rather than pointers, since that is what both forms can express. Arrays are shared
memory (uint32 words), global memory, or `cuda.local.array`s of constant size, which the compiler keeps in registers as
long as every index into them is a constant after unrolling.

    word                  PTX (SASS)                                       what it does
    mma_b1                mma.sync.m16n8k256.b1.and.popc (BMMA)            16 x 8 popcounts of 256 bits, by a warp
    wgmma_b1_chain        wgmma.m64nNk256.b1.and.popc (BGMMA), sm_90a      64 x N of them, by four warps
    ldmatrix_x4           ldmatrix.x4 (LDSM)                               four 8 x 16-byte tiles from shared memory
    cp_async8, cp_async16 cp.async (LDGSTS)                                global -> shared, past the registers
    ballot                vote.ballot (VOTE)                               one bit of each of 32 threads
    shuffle_xor           shfl.bfly (SHFL)                                 a value of the thread lane ^ mask
    float_bits            mov                                              the float with these bits
    split                 div.u32                                          quotient and remainder, in 32 bits
    popcount              popc (POPC)                                      set bits of a word
    clock                 mov %clock64                                     cycles of this multiprocessor

AND and not XOR: on sm_90 the tensor core's `xor.popc` is emulated by a call, `and.popc` is one instruction.
"""

from numba.cuda.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulator import *  # noqa: F403
else:
    from .ptx import *  # noqa: F403

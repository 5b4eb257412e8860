"""The CUDA ladder without a GPU: simulated against the reference, and compiled to machine code that is then read.

Numba's simulator is chosen when Numba is imported, so it gets a process of its own: `test_in_the_simulator` runs this
file once more with NUMBA_ENABLE_CUDASIM=1, and there it consists of the tests of the first half.

    NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/test_kernels_cuda.py       runs them directly
"""

import ctypes
import gc
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import abcnets

pytest.importorskip("numba")
pytest.importorskip("numba_cuda")

from kernels.cuda import launch as cuda_launch

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


if SIMULATED:
    from numba.cuda.simulator import kernel as simulator

    from kernels import registry
    from kernels.check import bits_of, error_of, layer_of, random_layer, reference, without_bits_out, wrong_bits
    from kernels.cuda import engine as cuda_engine
    from kernels.cuda import kept as cuda_kept
    from kernels.cuda import ladder as cuda_ladder
    from kernels.cuda import layer as cuda_layer
    from kernels.cuda import rung1_pack as cuda_pack
    from kernels.cuda import rung2_float as cuda_float
    from kernels.cuda import rung6_tensorcore as cuda_tensorcore
    from kernels.cuda import rung7_wgmma as cuda_wgmma
    from kernels.cuda import rung8_fused as cuda_fused

    # A simulated thread is a Python thread, and Numba's simulator polls them. Here they meet at a barrier instead,
    # which is several times faster, and enough for kernels whose threads all reach every syncthreads.
    def run_block(manager, grid_point, *args):
        places = list(np.ndindex(*manager._block_dim))
        manager.meeting = threading.Barrier(len(places))

        def target():
            try:
                manager._f(*args)
            except Exception:
                manager.meeting.abort()
                raise

        threads = [simulator.BlockThread(target, manager, grid_point, place, False) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for thread in threads:
            if thread.exception and not isinstance(thread.exception[0], threading.BrokenBarrierError):
                raise thread.exception[0].with_traceback(thread.exception[1])

    simulator.BlockManager.run = run_block
    simulator.BlockThread.syncthreads = lambda thread: thread._manager.meeting.wait(300)
    torch.set_num_threads(1)
    registry.implement("cuda", cuda_engine, abcnets)  # which needs no GPU
    SMALL_TILE, SMALL_GROUP = cuda_tensorcore.Tile(16, 32, 1, 1), cuda_tensorcore.Tile(64, 32, 4, 1)

    # H != W; channels that don't fill a word (33), fill one (64), spill into a third (130); ragged tiles, all borders.
    SHAPES = {
        "33 channels": dict(B=2, C=33, sizes=(4, 3), O=5, kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), M=2, N=2),
        "64 channels, stride 2": dict(
            B=1, C=64, sizes=(5, 4), O=9, kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1), M=1, N=3
        ),
        "130 channels, uneven": dict(
            B=1,
            C=130,
            sizes=(3, 6),
            O=35,
            kernel=(2, 3),
            stride=(1, 2),
            padding=(1, 0, 2, 1),
            M=2,
            N=1,
            dilation=(1, 2),
            zero=True,
        ),
        "64 channels, 1 x 1": dict(
            B=2, C=64, sizes=(2, 3), O=3, kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), M=3, N=1
        ),
    }

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch):
        monkeypatch.setattr(cuda_tensorcore, "TILES", (SMALL_TILE,))
        monkeypatch.setattr(cuda_wgmma, "TILES", (SMALL_GROUP,))
        monkeypatch.setattr(cuda_engine, "_matrix_rung", "mma")

    def packed(arguments):
        return cuda_pack.pack(arguments[0], arguments[4], arguments[5], len(arguments[3]))

    @pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("binary", [False, True], ids=["thermometer", "binary"])
    def test_pack(order, binary):
        x, _, _, _, thresholds, flips = random_layer(**(SHAPES["33 channels"] | dict(N=3, binary=binary)))[:6]
        x[1, 30, 2, 1], x[0, 0, 0, 0], x[0, 5, 1, 1] = math.nan, math.inf, thresholds[1, 5]
        thresholds[0, 3], thresholds[-1, 4] = -math.inf, math.inf
        words, poison = cuda_pack.pack(x.contiguous(memory_format=order), thresholds, flips, 3)
        bits = bits_of(x, thresholds, flips, 3)
        assert torch.equal(words, abcnets.pack_bits(bits, torch.int64).movedim(0, -1))
        assert torch.equal(poison.isnan(), x.isnan().any(1))
        assert not poison.nan_to_num().any()

    def test_float():
        arguments = random_layer(**SHAPES["64 channels, stride 2"])
        layer = layer_of(arguments)
        w = torch.randn(layer.O, layer.C, 3, 3)
        expected = torch.conv2d(arguments[0].double(), w.double(), layer.bias_O.double(), 2, 1)
        assert error_of(cuda_float.conv(layer, arguments[0], w), expected) < 3e-6

    COMMON = list(SHAPES)[:2]

    @pytest.mark.parametrize(
        "rung, shape",
        [(rung, shape) for rung in cuda_ladder.RUNGS for shape in (SHAPES if rung in ("popcount", "mma") else COMMON)],
    )
    def test_rung_is_the_reference(rung, shape):
        arguments = random_layer(**SHAPES[shape])
        arguments[0][0, 1, 1, 2] = math.nan
        y = cuda_ladder.RUNGS[rung](layer_of(arguments), *packed(arguments))
        assert error_of(y, reference(arguments)) < 3e-6

    @pytest.mark.parametrize("tile, shape", [((32, 16, 2, 1), "130 channels, uneven"), ((16, 64, 1, 2), "33 channels")])
    def test_tiles_of_several_warps(tile, shape):
        arguments = random_layer(**SHAPES[shape])
        y = cuda_tensorcore.conv(layer_of(arguments), *packed(arguments), tile=cuda_tensorcore.Tile(*tile))
        assert error_of(y, reference(arguments)) < 3e-6

    @pytest.mark.parametrize("conv", [cuda_fused.conv, cuda_ladder.wgmma_fused], ids=["mma", "wgmma"])
    def test_bits_out(conv):
        arguments = random_layer(**SHAPES["33 channels"], out_bases=3)
        arguments[-3][0, 1], arguments[-3][1, 2] = -math.inf, math.inf
        words = conv(layer_of(arguments), *packed(arguments), *cuda_fused.pad_outputs(*arguments[-3:-1]))
        assert wrong_bits(words, arguments) == 0

    BINARY = dict(binary=True, zero=True)

    @pytest.mark.parametrize("instruction", ["mma", "wgmma", "none"])
    def test_operator_in_the_binary_code(instruction, monkeypatch):
        monkeypatch.setattr(cuda_engine, "_matrix_rung", instruction)
        monkeypatch.setattr(cuda_engine, "_has_mma", lambda device: instruction != "none")
        shape = SHAPES["33 channels"] | BINARY
        arguments = random_layer(**shape)
        words, _ = packed(arguments)
        for x in (arguments[0], words):
            assert error_of(cuda_engine.packed_conv(x, *arguments[1:]), reference(arguments)) < 3e-6
        arguments = random_layer(**shape, out_bases=2, out_binary=True)
        arguments[-3][0, 1], arguments[-3][2, 2] = -math.inf, math.inf
        assert wrong_bits(cuda_engine.packed_conv(words, *arguments[1:]), arguments) == 0

    @pytest.mark.parametrize("out_binary", [False, True])
    def test_operator_from_binary_floats_to_bits(out_binary):
        shape = SHAPES["64 channels, 1 x 1"] | BINARY | dict(N=3, M=1)
        arguments = random_layer(**shape, out_bases=3, out_binary=out_binary)
        assert wrong_bits(cuda_engine.packed_conv(*arguments), arguments) == 0
        arguments[0][0, 5, 0, 0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            cuda_engine.packed_conv(*arguments)

    def test_operator_refuses_thresholds_of_no_code():
        arguments = list(random_layer(**SHAPES["64 channels, 1 x 1"], out_bases=2))
        arguments[-1] = 1
        with pytest.raises(ValueError, match="1 bases have 1 thresholds or, in the binary code, 1; got 2"):
            cuda_engine.packed_conv(*arguments)
        arguments = list(random_layer(**SHAPES["64 channels, 1 x 1"]))
        arguments[4] = arguments[4].expand(4, -1).contiguous()
        with pytest.raises(ValueError, match="1 bases have 1 thresholds or, in the binary code, 1; got 4"):
            cuda_engine.packed_conv(*arguments)

    @pytest.mark.parametrize(
        "shape",
        [
            dict(B=3, C=70, sizes=(), O=10, kernel=(), stride=(), padding=()),
            dict(B=2, C=20, sizes=(7,), O=40, kernel=(3,), stride=(2,), padding=(1, 0)),
            dict(B=1, C=20, sizes=(2, 3, 2), O=4, kernel=(2, 2, 2), stride=(1,) * 3, padding=(1,) * 6),
        ],
        ids=["linear", "1-D", "3-D"],
    )
    def test_operator_in_other_dimensions(shape):
        arguments = random_layer(**shape, M=2, N=1, dtype=torch.bfloat16)
        y = cuda_engine.packed_conv(*arguments)
        assert y.dtype == torch.bfloat16
        assert error_of(y, reference(arguments)) < 1e-2
        arguments = random_layer(**shape, M=1, N=2, out_bases=2)
        assert wrong_bits(cuda_engine.packed_conv(*arguments), arguments) == 0

    def test_operator_takes_words_and_falls_to_a_lower_rung(monkeypatch):
        arguments = random_layer(**SHAPES["33 channels"], out_bases=2)
        words, _ = packed(arguments)
        assert wrong_bits(cuda_engine.packed_conv(words, *arguments[1:]), arguments) == 0
        monkeypatch.setattr(cuda_engine, "_has_mma", lambda device: False)
        assert wrong_bits(cuda_engine.packed_conv(words, *arguments[1:]), arguments) == 0
        arguments = without_bits_out(arguments)
        assert error_of(cuda_engine.packed_conv(words, *arguments[1:]), reference(arguments)) < 3e-6

    def test_operator_takes_one_threshold_for_all_channels():
        arguments = list(random_layer(**SHAPES["33 channels"]))
        arguments[4], arguments[5] = arguments[4][:, 0].contiguous(), None
        assert error_of(cuda_engine.packed_conv(*arguments), reference(arguments)) < 3e-6

    def test_operator_refuses_to_say_nan_in_bits():
        arguments = random_layer(**SHAPES["64 channels, 1 x 1"], out_bases=1)
        arguments[0][0, 5, 0, 0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            cuda_engine.packed_conv(*arguments)

    def test_what_is_kept_follows_the_tensors():
        arguments = random_layer(**SHAPES["64 channels, 1 x 1"])
        before = len(cuda_engine._layers)
        for change in (lambda: None, lambda: arguments[2].mul_(2), lambda: arguments[1].bitwise_not_()):
            change()
            assert error_of(cuda_engine.packed_conv(*arguments), reference(arguments)) < 3e-6
        assert len(cuda_engine._layers) == before + 1
        del arguments, change
        gc.collect()
        assert len(cuda_engine._layers) == before

    def test_what_is_kept_of_sizes_is_bounded():
        layer = layer_of(random_layer(**SHAPES["64 channels, 1 x 1"]))
        for size in range(1, 3 * cuda_layer.SIZES_PER_LAYER):
            place = layer.place(2, size)
            for batch in range(1, 40):
                cuda_tensorcore.choose_tile(layer, place, batch)
                cuda_tensorcore.arguments(layer, place, batch)
                assert place.no_poison(batch).shape == (batch, 2, size)
        assert len(layer._places) == cuda_layer.SIZES_PER_LAYER
        assert len(place._numbers) == cuda_layer.NUMBERS_PER_SIZE
        assert len(place._no_poison) == cuda_layer.BATCHES_PER_SIZE
        layer, place = weakref.ref(layer), None
        assert layer() is None  # without the cyclic collector

    class Stream:
        """A stand-in for a stream: how often it was waited for."""

        waited = 0

        def synchronize(self):
            self.waited += 1

    @pytest.fixture
    def gpu(monkeypatch):
        """What the rules for streams see of a GPU: the current stream, whether a graph captures it, and what torch is
        told. It computes nothing: `read` are the tensors that kernels were given.
        """
        gpu = SimpleNamespace(stream=Stream(), capturing=False, recorded=set(), read=[])
        monkeypatch.setattr(cuda_kept, "SIMULATED", False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: gpu.recorded.add((id(t), s)), raising=False)

        def launch(kernel, grid, *arguments, **options):
            gpu.read += [weakref.ref(t) for t in arguments if isinstance(t, torch.Tensor)]

        monkeypatch.setattr(cuda_launch.Kernel, "__call__", launch)
        return gpu

    def kept_of(gpu, arguments):
        """What kernels were given that has outlived the call, and is none of its arguments."""
        given = {id(t) for t in arguments if isinstance(t, torch.Tensor)}
        return {id(t): t for reference in gpu.read if (t := reference()) is not None and id(t) not in given}

    def test_kept_tensors_are_finished_and_recorded_where_they_are_read(gpu):
        kept, first, other = cuda_kept.Kept(), gpu.stream, Stream()
        a = kept.add(torch.ones(3))
        assert first.waited == 1
        kept.read()
        gpu.stream = other
        kept.read()
        assert gpu.recorded == {(id(a), first), (id(a), other)}
        gpu.recorded.clear()
        kept.read()
        assert not gpu.recorded and other.waited == 0  # once is enough
        b = kept.add(torch.ones(3))
        assert other.waited == 1 and gpu.recorded == {(id(b), first), (id(b), other)}
        gone, gpu.stream = id(a), Stream()
        del a
        kept.read()
        assert gone not in kept._tensors and (id(b), gpu.stream) in gpu.recorded

    LAUNCHES = {
        "floats": dict(out_bases=None),
        "floats to bits": dict(out_bases=2),
        "words": dict(out_bases=None, words=True),
        "words to bits": dict(out_bases=2, words=True),
        "binary words to bits": dict(out_bases=2, words=True, binary=True),
    }

    def a_call(out_bases, words=False, binary=False):
        shape = SHAPES["64 channels, 1 x 1"] | dict(N=2, binary=binary, zero=binary)
        arguments = random_layer(**shape, out_bases=out_bases, out_binary=binary)
        return [packed(arguments)[0] if words else arguments[0], *arguments[1:]]

    @pytest.mark.parametrize("tensor_core", [True, False], ids=["mma", "bases"])
    @pytest.mark.parametrize("launch", LAUNCHES)
    def test_whatever_outlives_a_call_may_be_read_on_any_stream(gpu, launch, tensor_core, monkeypatch):
        monkeypatch.setattr(cuda_engine, "_has_mma", lambda device: tensor_core)
        arguments = a_call(**LAUNCHES[launch])
        cuda_engine.packed_conv(*arguments)
        tables = kept_of(gpu, arguments)
        assert len(tables) >= 4 and gpu.stream.waited >= len(tables)
        made_on, gpu.stream = gpu.stream, Stream()
        cuda_engine.packed_conv(*arguments)
        assert kept_of(gpu, arguments).keys() == tables.keys() and gpu.stream.waited == 0
        for stream in made_on, gpu.stream:
            assert {(table, stream) for table in tables} <= gpu.recorded

    def test_pooled_flips_may_be_read_on_any_stream(gpu):
        words, flips = torch.randint(-(2**63), 2**63 - 1, (1, 4, 4, 1, 1)), torch.rand(64) < 0.5
        for _ in range(2):
            cuda_engine.packed_max_pool(words, flips, 64, (2, 2), (2, 2), (0, 0), (1, 1), False, False)
            made_on, gpu.stream = gpu.stream, Stream()
        (table,) = kept_of(gpu, (words, flips))
        assert len([stream for tensor, stream in gpu.recorded if tensor == table]) == 2 and made_on.waited == 0

    @pytest.mark.parametrize("launch", LAUNCHES)
    def test_a_cuda_graph_makes_nothing_and_keeps_what_it_reads(gpu, launch):
        arguments = a_call(**LAUNCHES[launch])
        gpu.capturing = True
        with pytest.raises(RuntimeError, match="once with an input of this shape before a CUDA graph captures it"):
            cuda_engine.packed_conv(*arguments)
        gpu.capturing = False
        cuda_engine.packed_conv(*arguments)
        gpu.capturing = True
        gpu.read.clear()
        cuda_engine.packed_conv(*arguments)
        gpu.capturing = False
        read = [weakref.ref(table) for table in kept_of(gpu, arguments).values()]
        assert len(read) >= 4
        arguments[2].mul_(2)
        cuda_engine.packed_conv(*arguments)  # from here on other tables
        assert all(reference() is not None for reference in read)
        arguments.clear()
        assert not any(reference() is not None for reference in read)

    @pytest.mark.parametrize("sizes", [((3, 3), (2, 2), (1, 1), (1, 1), False), ((2, 2), (2, 2), (0, 0), (1, 1), True)])
    @pytest.mark.parametrize("binary", [False, True])
    def test_max_pool(sizes, binary):
        words = torch.randint(-(2**63), 2**63 - 1, (2, 5, 3, 2, 2))
        flips = torch.rand(128) < 0.5
        expected = abcnets.packed_max_pool(words, flips, 128, *sizes, binary)
        assert torch.equal(cuda_engine.packed_max_pool(words, flips, 128, *sizes, binary), expected)

else:
    from kernels.cuda import pool as cuda_pool
    from kernels.cuda import ptx as cuda_ptx
    from kernels.cuda import rates as cuda_rates
    from kernels.cuda import rung1_pack as cuda_pack
    from kernels.cuda import rung3_popcount as cuda_popcount
    from kernels.cuda import rung4_shared as cuda_shared
    from kernels.cuda import rung5_bases as cuda_bases
    from kernels.cuda import rung6_tensorcore as cuda_tensorcore
    from kernels.cuda import rung7_wgmma as cuda_wgmma
    from kernels.cuda import rung8_fused as cuda_fused
    from kernels.cuda import simulator as cuda_simulator
    from kernels.cuda.launch import uint32

    def test_both_forms_speak_the_same_words():
        assert cuda_ptx.__all__ == cuda_simulator.__all__

    def test_in_the_simulator():
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

    def tool(package, name):
        """A program out of one of NVIDIA's wheels."""
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"the wheel {package} is not installed")
        for file in files:
            if file.name == name and Path(file.locate()).exists():
                return str(file.locate())
        pytest.skip(f"the wheel {package} has no {name} for this machine")

    def compiled(kernel, capability, folder):
        """(how often each opcode occurs, registers, bytes of stack and spills) of a kernel's machine code."""
        ptxas, nvdisasm = tool("nvidia-cuda-nvcc", "ptxas"), tool("nvidia-cuda-nvdisasm", "nvdisasm")
        tool("nvidia-nvvm", "libnvvm.so.4"), tool("nvidia-cuda-nvrtc", "libnvrtc.so.13")
        source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
        source.write_text(kernel.ptx(capability))
        architecture = "sm_" + "".join(map(str, capability))
        report = subprocess.run(
            [ptxas, "-v", "-arch", architecture, source, "-o", binary], capture_output=True, text=True, check=True
        ).stderr
        assembly = subprocess.run([nvdisasm, binary], capture_output=True, text=True, check=True).stdout
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", assembly, re.M)
        counts = {opcode: opcodes.count(opcode) for opcode in set(opcodes)}
        registers = int(re.search(r"Used (\d+) registers", report).group(1))
        spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)))
        assert "serialized" not in report  # ptxas says so where wgmma instructions wait for each other
        return counts, registers, spilled

    def test_arguments_reach_the_driver_as_the_machine_code_reads_them(monkeypatch):
        """A launch up to the driver, which is a stand-in here: what lies in the slots is what the PTX declares."""
        seen = {}

        class Driver:
            def cuLaunchKernel(self, function, *rest):
                *sizes, shared, _, addresses, _ = rest
                seen.update(sizes=sizes, shared=shared, addresses=list(addresses))
                return 0

        kernel = cuda_pool.pool_kernel()
        monkeypatch.setattr(cuda_launch, "_driver", Driver)
        monkeypatch.setattr(cuda_launch, "_use_torchs_context", lambda: None)
        monkeypatch.setattr(kernel, "_function", lambda shared: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
        out, words, flips = (torch.zeros(s, dtype=torch.int64) for s in ((1, 2, 3, 1, 2), (1, 4, 6, 1, 2), (1,)))
        kernel((5, 2), out, words, flips, *range(-4, 4), shared=64)
        declared = re.findall(r"\.param \.(\w+)", kernel.ptx((8, 0)).split(".entry")[1].split(")")[0])
        read = {"u64": ctypes.c_int64, "u32": ctypes.c_int32}
        values = [read[kind].from_address(at).value for kind, at in zip(declared, seen["addresses"], strict=True)]
        array = [0, 0, 12, 8, out.data_ptr(), *out.shape, *(8 * s for s in out.stride())]
        assert values[: len(array)] == array
        assert values[-8:] == list(range(-4, 4))
        assert seen["sizes"] == [5, 2, 1, 256, 1, 1] and seen["shared"] == 64

    AMPERE, HOPPER = (8, 0), (9, 0, "a")
    LARGEST = cuda_tensorcore.TILES[0]

    @pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm_80", "sm_90a"])
    def test_rung_6_is_made_of_tensor_core_instructions(capability, tmp_path):
        counts, registers, spilled = compiled(cuda_tensorcore.conv_kernel(LARGEST), capability, tmp_path)
        assert counts["BMMA"] >= 16 and counts["LDSM"] >= 6 and counts["LDGSTS"] >= 2
        assert spilled == 0 and registers <= 255

    def test_rung_7_is_made_of_wgmma(tmp_path):
        counts, registers, spilled = compiled(cuda_wgmma.conv_kernel(cuda_wgmma.TILES[0], 5), HOPPER, tmp_path)
        assert counts["BGMMA"] >= 5 and counts["LDSM"] >= 5 and "BMMA" not in counts
        assert spilled == 0 and registers <= 255

    def test_rung_8_writes_words(tmp_path):
        kernel = cuda_tensorcore.conv_kernel(LARGEST, cuda_fused.bits_output, uint32)
        counts, _, spilled = compiled(kernel, HOPPER, tmp_path)
        assert counts["BMMA"] >= 16 and counts["SHFL"] >= 2 and counts["STG"] <= 16
        assert spilled == 0

    @pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm_80", "sm_90a"])
    def test_lower_rungs_compile(capability, tmp_path):
        kernels = {
            "VOTE": cuda_pack.pack_channels_last_kernel(2, 2),
            "FSETP": cuda_pack.pack_kernel(3, 7),
            "LOP3": cuda_pool.binary_pool_kernel(2),
            "POPC": cuda_popcount.conv_kernel(),
            "LDS": cuda_shared.conv_kernel(),
            "BAR": cuda_bases.conv_kernel(3, 3),
            "BMMA": cuda_rates.bmma_kernel(256),
        }
        if capability == HOPPER:
            kernels["BGMMA"] = cuda_rates.bgmma_kernel(128, 256)
        for opcode, kernel in kernels.items():
            counts, _, spilled = compiled(kernel, capability, tmp_path)
            assert counts[opcode] and spilled == 0, kernel.function.__name__

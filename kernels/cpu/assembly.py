"""The convolution's tile on ARM, from here: LLVM compiles it, and its instructions are counted.

    python -m kernels.cpu.assembly             what the inner loops become; with llvm-mca, an estimate of speed
    python -m kernels.cpu.assembly --write     the same, into results/arm.csv and README.md
    python -m kernels.cpu.assembly --run       is it right? In an emulator, on random numbers (Debian and Ubuntu:
                                               apt install qemu-user binutils-aarch64-linux-gnu)

A product is that of two bits. What the processor counts at best is 128 of them with three instructions: eor, cnt and
udot or add. The estimate is of the inner loop alone, by LLVM's model of the processor: no caches, no packing, no rows.
"""

import argparse
import collections
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types

from .. import layout, report
from ..check import WRONG
from ..command import Parser, Refused
from . import vector
from .job import PART_BYTES

TRIPLE = "aarch64-unknown-linux-gnu"
PROCESSORS = {"cortex-a72": False, "neoverse-n1": True, "apple-m1": True}  # and whether they have a dot product
I64 = ir.IntType(64)
DOTS, BYTES = layout.ARM_LANES[:2]


def tile_module(lanes: layout.Lanes, N: int, uniform: bool, masked: bool = False) -> tuple[ir.Module, int]:
    """(a module with vector.convolve_tile as the function `tile`, the pixels of the tile)."""
    pixels = vector.tile_pixels(N, uniform, lanes)
    widths = lanes.bits, lanes.registers, lanes.register_bits, lanes.repeats
    literals = N, int(uniform), int(masked), *widths, pixels
    signature, emit = vector.convolve_tile._defn(None, *[types.int64] * 15, *map(types.literal, literals))
    module = ir.Module("tile")
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 15), "tile")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    emit(SimpleNamespace(get_dummy_value=lambda: None), builder, signature, [*function.args, *[None] * len(literals)])
    builder.ret_void()
    return module, pixels


def compiled(module: ir.Module, processor: str):
    """(LLVM's module after optimization, the target machine, which emits its assembly or object)."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(str(module))
    module.verify()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=processor, opt=3)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return module, machine


def tile_assembly(lanes: layout.Lanes, N: int, uniform: bool, processor: str) -> tuple[str, int]:
    """(the tile's assembly on an ARM processor, the pixels of the tile)."""
    module, pixels = tile_module(lanes, N, uniform)
    module, machine = compiled(module, processor)
    return machine.emit_assembly(module), pixels


def inner_loop(assembly: str) -> list[str]:
    """The instructions of the block that counts most, up to its branch."""
    block = max(re.split(r"\n(?=\.LBB)", assembly), key=lambda block: len(re.findall(r"\scnt\s", block)))
    instructions = []
    for line in block.splitlines()[1:]:
        line = line.partition("//")[0].strip()
        if line and not line.startswith("."):
            instructions.append(line)
            if re.match(r"(b\.|cbn?z|tbn?z)", line):
                break
    return instructions


def spills(instructions: list[str]) -> int:
    """How many of them move vectors to the stack or from it."""
    return sum(bool(re.search(r"\bq\d+.*\[sp", line)) for line in instructions)


def products_a_cycle(instructions: list[str], products: int, processor: str) -> float | None:
    """llvm-mca's estimate; None without it."""
    if shutil.which("llvm-mca") is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(instructions) + "\n")
        file.flush()
        command = ["llvm-mca", f"-mtriple={TRIPLE}", f"-mcpu={processor}", "-iterations=100", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    cycles = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if cycles is None:
        raise Refused(f"llvm-mca says nothing about {processor}: {done.stderr.strip().splitlines()[0]}")
    return products * 100 / int(cycles[1])


def rows() -> list[dict]:
    """A row a processor and kind of activations."""
    found = []
    for processor, has_dots in PROCESSORS.items():
        lanes = DOTS if has_dots else BYTES
        for N, uniform in ((1, False), (2, False), (2, True), (3, False), (3, True)):
            assembly, pixels = tile_assembly(lanes, N, uniform, processor)
            instructions = inner_loop(assembly)
            registers = pixels * vector.counters_of(N, uniform) * lanes.registers
            speed = products_a_cycle(instructions, 128 * registers, processor)
            counts = collections.Counter(line.split()[0] for line in instructions)
            found.append({
                "processor": processor, "lanes": lanes.bits, "N": N, "uniform": uniform,
                "instructions_per_128": round(len(instructions) / registers, 2),
                "spills": spills(instructions),
                "popcounts_a_cycle": "" if speed is None else round(speed, 1),
                "instructions": " ".join(f"{count} {name}" for name, count in counts.most_common()),
            })  # fmt: skip
    return found


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = [
        "| processor | lanes | N | instructions for 128 bits counted | bits counted a cycle, by llvm-mca |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        levels = f"{row['N']}, uniform" if row["uniform"] else row["N"]
        cells = row["processor"], row["lanes"], levels, row["instructions_per_128"], row["popcounts_a_cycle"] or "-"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- in an emulator


def random_case(lanes: layout.Lanes, N: int, uniform: bool, masked: bool, pixels: int, seed: int) -> tuple:
    """(the tile's fifteen arguments, numbers or arrays; what it should put out, [pixel][channel])."""
    random = np.random.default_rng(seed)
    M, taps, words, image_pixels, O = 2, 9, 2, 40, lanes.block
    S, unit = layout.image_words(N, uniform), np.dtype(f"u{lanes.bits // 8}")
    U = 64 * words // lanes.bits
    image_XPS = random.integers(0, 1 << 64, (image_pixels, words, S), np.uint64)
    weights_MTUO = random.integers(0, 1 << lanes.bits, (M, taps, U, O), unit)
    masks_TUO = random.integers(0, 1 << lanes.bits, (taps, U, O), unit) if masked else ~np.zeros((taps, U, O), unit)
    windows, tap_pixels = random.integers(0, image_pixels - 20, pixels), random.integers(0, 20, taps)
    C = 1 if uniform and N == 2 else S
    scales_MNO = random.integers(-8, 8, (M, N, O)).astype(np.float32) / 4  # so that sums are exact
    constants_GO = random.integers(-99, 99, (3, O)).astype(np.float32)
    classes, differing, start = random.integers(0, 3, pixels), random.integers(0, 999, image_pixels, np.int32), -576
    offsets = tap_pixels[:, None] * 8 * words * S + lanes.offsets(np.arange(U), 8 * S)

    units_XSU = np.ascontiguousarray(image_XPS.swapaxes(1, 2)).view(unit)
    expected = constants_GO[classes].astype(np.float64)
    for p, m in np.ndindex(pixels, M):
        seen_STU = units_XSU[windows[p] + tap_pixels].swapaxes(0, 1)
        differ = seen_STU[..., None] ^ weights_MTUO[m]
        if C < S:  # d | (a ^ w)
            differ = (seen_STU[0, ..., None] | differ[1])[None]
        counts = start + np.bitwise_count(differ & masks_TUO).sum((1, 2), dtype=np.int64)
        if uniform:
            counts = 2 * counts[:1] + (counts[1:] if C == 2 else -differing[windows[p]])
        expected[p] += (counts * scales_MNO[m, : len(counts)]).sum(0)
    arguments = (
        image_XPS, 8 * words * S, offsets.astype(np.int64), taps * U, start, weights_MTUO, masks_TUO, M, scales_MNO,
        constants_GO, windows.astype(np.int64), (classes * constants_GO[0].nbytes).astype(np.int64), differing,
        np.zeros(2 * pixels * C * lanes.registers * 16, np.uint8), np.zeros(PART_BYTES * (O // 16), np.uint8),
    )  # fmt: skip
    return arguments, expected


START = """
    .text
    .globl _start
_start:
    bl run
    mov x0, #1
    ldr x1, =memory + {place}
    ldr x2, ={size}
    mov x8, #64    // write
    svc #0
    mov x0, #0
    mov x8, #93    // exit
    svc #0
"""


def program(module: ir.Module, arguments: tuple) -> str:
    """Add `run` to the module, which calls the tile. Returns the assembly that writes the last argument to stdout then.

    With both it is a program, which needs no library.
    """
    places, memory = [], bytearray()
    for argument in arguments:
        places.append(None)
        if isinstance(argument, np.ndarray):
            memory += bytes(-len(memory) % 64)
            places[-1] = len(memory)
            memory += argument.tobytes()
    kind = ir.ArrayType(ir.IntType(8), len(memory))
    variable = ir.GlobalVariable(module, kind, "memory")
    variable.align, variable.initializer = 64, ir.Constant(kind, memory)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "run")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    base = builder.ptrtoint(variable, I64)
    values = [I64(number) if place is None else builder.add(base, I64(place))
              for number, place in zip(arguments, places)]  # fmt: skip
    builder.call(module.get_global("tile"), values)
    builder.ret_void()
    return START.format(place=places[-1], size=arguments[-1].nbytes)


def problem_in_an_emulator() -> str | None:
    """What is wrong with the tiles for ARM, as qemu runs them; None if nothing is."""
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
    assembler, linker = (shutil.which(f"aarch64-linux-gnu-{tool}") for tool in ("as", "ld"))
    if None in (emulator, assembler, linker):
        raise Refused("this needs qemu-aarch64 and an assembler: apt install qemu-user binutils-aarch64-linux-gnu")
    layers = [(N, uniform, masked) for masked in (False, True) for N, uniform in
              ((1, False), (2, False), (2, True), (3, False), (3, True), (5, False))]  # fmt: skip
    for processor, has_dots in PROCESSORS.items():
        for lanes in layout.ARM_LANES:
            for seed, (N, uniform, masked) in enumerate(layers):
                if lanes is DOTS and not has_dots:
                    continue
                module, pixels = tile_module(lanes, N, uniform, masked)
                arguments, expected = random_case(lanes, N, uniform, masked, pixels, seed)
                start = program(module, arguments)
                module, machine = compiled(module, processor)
                with tempfile.TemporaryDirectory() as folder:
                    source, object_file, executable = (Path(folder, f"tile{end}") for end in (".s", ".o", ""))
                    source.write_text(machine.emit_assembly(module) + start)
                    subprocess.run([assembler, "-march=armv8.6-a+sve", "-o", object_file, source], check=True)
                    subprocess.run([linker, "-o", executable, object_file], check=True)
                    done = subprocess.run([emulator, "-cpu", "max", executable], capture_output=True)
                case = f"{lanes}, N = {N}, uniform {uniform}, masked {masked}, on {processor}"
                if done.returncode:
                    return f"ends with {done.returncode} for {case}"
                rows = np.frombuffer(done.stdout, np.float32).reshape(lanes.block // 16, -1, 16)[:, :pixels]
                if not (rows.swapaxes(0, 1).reshape(pixels, -1) == expected).all():
                    return f"wrong numbers for {case}"


def main(arguments=None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into results/arm.csv and README.md")
    parser.add_argument("--run", action="store_true", help="check the tiles in qemu instead")
    options = parser.parse_args(arguments)

    def tell():
        if options.run:
            problem = problem_in_an_emulator()
            print(f"the tiles for ARM: {problem or 'right'}")
            sys.exit(WRONG if problem else 0)
        if options.write and shutil.which("llvm-mca") is None:
            raise Refused("the estimates need llvm-mca, a program of LLVM, which is not installed here")
        found = rows()
        print(table(found))
        if options.write:
            report.write_arm(found, table(found))

    parser.run(tell)


if __name__ == "__main__":
    main()

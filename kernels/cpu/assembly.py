"""The convolution's tile on ARM, from here: LLVM compiles it, and its instructions are counted. Nothing runs.

    python -m kernels.cpu.assembly             what the inner loops become; with llvm-mca, an estimate of speed
    python -m kernels.cpu.assembly --write     the same, into results/arm.csv and README.md

A product is that of two bits. What the processor counts at best is 128 of them with three instructions: eor, cnt and
udot or add. The estimate is of the inner loop alone, by LLVM's model of the processor: no caches, no packing, no rows.
"""

import collections
import re
import shutil
import subprocess
import tempfile
from types import SimpleNamespace

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from .. import layout, report
from ..command import Parser, Refused
from . import vector

TRIPLE = "aarch64-unknown-linux-gnu"
PROCESSORS = {"cortex-a72": False, "neoverse-n1": True, "apple-m1": True}  # and whether they have a dot product
DOTS, BYTES = layout.ARM_LANES[:2]


def tile_assembly(lanes: layout.Lanes, N: int, uniform: bool, processor: str) -> tuple[str, int]:
    """(the assembly of vector.convolve_tile on an ARM processor, the pixels of the tile)."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    pixels = vector.tile_pixels(N, uniform, lanes)
    literals = N, int(uniform), 0, lanes.bits, lanes.registers, lanes.register_bits, pixels
    signature, emit = vector.convolve_tile._defn(None, *[types.int64] * 15, *map(types.literal, literals))
    module = ir.Module("tile")
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 15), "tile")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    emit(SimpleNamespace(get_dummy_value=lambda: None), builder, signature, [*function.args, *[None] * len(literals)])
    builder.ret_void()
    compiled = llvm.parse_assembly(str(module))
    compiled.verify()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=processor, opt=3)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(compiled, passes)
    return machine.emit_assembly(compiled), pixels


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


def main(arguments=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into results/arm.csv and README.md")
    options = parser.parse_args(arguments)

    def tell():
        if options.write and shutil.which("llvm-mca") is None:
            raise Refused("the estimates need llvm-mca, a program of LLVM, which is not installed here")
        found = rows()
        print(table(found))
        if options.write:
            report.write_arm(found, table(found))

    parser.run(tell)


if __name__ == "__main__":
    main()

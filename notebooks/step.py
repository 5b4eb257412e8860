"""What a training step costs, binarized against float; what torch.compile makes of it; what a forward pass costs.

`experiment.py step` measures one of the `NETWORKS`, `experiment.py compile` the nine-layer one; a row a case, into
out/results. `make step` writes the tracked table, notebooks/results/step.csv.
"""

import functools
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import nine_layer, resnet20
from training import fast_bfloat16, mixed_precision

import abcnets
from kernels.clock import interleaved_medians, machine

NETWORKS = {"nine-layer": (nine_layer, (1, 28, 28)), "resnet-20": (resnet20, (3, 32, 32))}  # and an image's shape


def training_step(M: int | None, N: int | None, batch_size: int, device: torch.device, mixed: bool,
                  compiled: bool = False, code=("thermometer", "thermometer"), network="nine-layer"):  # fmt: skip
    """A function that makes one full step (forward, backward, optimizer) of a network."""
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model = build()
    if M or N:
        model = abcnets.convert(model, M, N, code=code)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch_size, *shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    def step():
        with mixed_precision(device, mixed):
            loss = F.cross_entropy(forward(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def inference(form: str, M: int, N: int, batch_size: int, device: torch.device, compiled: bool):
    """A function that runs the nine-layer network once: "float", "binarized" or "packed" (with one convolution)."""
    torch.manual_seed(0)
    model = nine_layer().eval()
    images = torch.randn(batch_size, 1, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    if form != "float":
        model = abcnets.convert(model, M, N)
    if form == "packed":
        model = abcnets.pack(model, engine="float")
    model = model.to(device, memory_format=torch.channels_last)
    forward = torch.compile(model, fullgraph=True) if compiled else model

    @torch.inference_mode()
    def run():
        forward(images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def step_memory(kind: tuple, **options) -> tuple[float, float]:
    """(MiB of tensors at a step's peak, MiB that the process holds at its peak beyond what a step on one image needs).

    Call it in a fresh process. The first is what the step needs, to the byte. The second has the gaps in malloc's heap
    too, which differ from run to run. On a GPU both are what torch's allocator gave out.
    """
    on_gpu = options["device"].type == "cuda"
    peak = torch.cuda.max_memory_allocated if on_gpu else _peak_resident
    training_step(*kind, **{**options, "batch_size": 1})()
    before = peak()
    step = training_step(*kind, **options)
    for _ in range(3):
        step()
    held = (peak() - before) / 2**20
    return (held if on_gpu else _peak_of_tensors(step)), held


def _peak_of_tensors(step) -> float:
    """MiB of CPU tensors that a step makes and needs at the same time, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events)) / 2**20


def _peak_resident() -> int:
    """Bytes of memory that this process held at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands getrusage's peak down from parent to child: it can't be used there
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_steps(M: int | None, N: int | None, rounds: int, threads: int | None, **common) -> Iterator[dict]:
    """Time and memory of a step, in `_precisions`. common: batch_size, device, code, network."""
    kinds = {"float": (None, None), "binarized": (M, N)}
    for mixed in _precisions(common["device"]):
        steps = {name: training_step(*kind, mixed=mixed, **common) for name, kind in kinds.items()}
        ms = {name: 1000 * seconds for name, seconds in interleaved_medians(steps, rounds=rounds).items()}
        mib = {}
        for name, kind in kinds.items():
            with torch.multiprocessing.get_context("spawn").Pool(1, use_threads, (threads,)) as pool:
                mib[name] = pool.apply(step_memory, (kind,), {"mixed": mixed, **common})
        yield {
            "network": common["network"], "M": M, "N": N, "code": ",".join(dict.fromkeys(common["code"])),
            "precision": "mixed" if mixed else "float32", "batch_size": common["batch_size"],
            "threads": torch.get_num_threads(),
            "float_ms": round(ms["float"], 1), "binarized_ms": round(ms["binarized"], 1),
            "ratio": round(ms["binarized"] / ms["float"], 3),
            "float_mib": round(mib["float"][0], 1), "binarized_mib": round(mib["binarized"][0], 1),
            "memory_ratio": round(mib["binarized"][0] / mib["float"][0], 3),
            "float_held_mib": round(mib["float"][1]), "binarized_held_mib": round(mib["binarized"][1]),
            **machine(common["device"]),
        }  # fmt: skip


def _precisions(device: torch.device) -> tuple[bool, ...]:
    """Whether mixed: both, where the machine computes in bfloat16; else a mixed step would be one in float32."""
    return (False, True) if fast_bfloat16(device) else (False,)


def use_threads(count: int | None) -> None:
    if count:
        torch.set_num_threads(count)


@torch.inference_mode()
def milliseconds(networks: dict[str, torch.nn.Module], images: torch.Tensor, rounds: int = 9) -> dict[str, float]:
    """Median milliseconds that each network takes for a batch, called in turns."""
    calls = {name: functools.partial(network, images) for name, network in networks.items()}
    return {name: 1000 * seconds for name, seconds in interleaved_medians(calls, rounds=rounds).items()}


def measure_compiled(M: int | None, N: int | None, rounds: int, **common) -> Iterator[dict]:
    """torch.compile (Inductor, one graph) against eager, in turns: training steps in `_precisions`, and inference."""
    cases = []
    for mixed in _precisions(common["device"]):
        for form, kind in (("float", (None, None)), ("binarized", (M, N))):
            make = functools.partial(training_step, *kind, mixed=mixed, **common)
            cases.append(("training step, " + ("mixed" if mixed else "float32"), form, make))
    for form in ("float", "binarized", "packed"):
        cases.append(("inference, float32", form, functools.partial(inference, form, M, N, **common)))
    for what, form, make in cases:
        forms = {"eager": make(compiled=False), "compiled": make(compiled=True)}
        ms = {name: 1000 * seconds for name, seconds in interleaved_medians(forms, rounds=rounds).items()}
        bases = {"M": None, "N": None} if form == "float" else {"M": M, "N": N}
        yield {
            "network": "nine-layer", "what": what, "form": form, **bases, "batch_size": common["batch_size"],
            "eager_ms": round(ms["eager"], 2), "compiled_ms": round(ms["compiled"], 2),
            "speedup": round(ms["eager"] / ms["compiled"], 3),
            **machine(common["device"], torch.get_num_threads()),
        }  # fmt: skip

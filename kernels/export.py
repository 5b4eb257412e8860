"""One ONNX file of a model, in which packed weights stay bits and standard operators unpack them."""

import copy
import functools
import warnings

import torch
from torch import Tensor, nn


def export_onnx(abcnets, model: nn.Module, example_input: Tensor, path, activations: str | None, calibration):
    """What `abcnets.export_onnx` documents; abcnets is the module whose layers the model is made of."""
    if activations not in (None, "int8"):
        raise ValueError(f"activations must be None, which leaves them float, or 'int8'; got {activations!r}")
    if (activations is None) != (calibration is None):
        raise ValueError("calibration batches belong to activations='int8', which needs them and nothing else does")
    _onnx()  # before minutes of calibration
    if activations is None:
        program, report = _plain_program(abcnets, model, example_input), None
    else:
        program, report = int8_program(abcnets, model, example_input, calibration)
    write(abcnets, program, path)
    return report


def _onnx():
    try:
        import onnx_ir
        import onnx_ir.passes.common
        from onnxscript.optimizer import optimize_ir
    except ImportError as error:
        raise ImportError(f"export_onnx needs two more packages, `pip install onnx onnxscript`: {error}") from None
    return onnx_ir, optimize_ir


def write(abcnets, program: torch.export.ExportedProgram, path) -> None:
    """A program as an ONNX file; what unpacks bits, and what integers mean, stays operators in it."""
    onnx_ir, optimize_ir = _onnx()

    def from_integers(node) -> bool | None:  # folded into a constant, they would be up to 32 times as large
        kept = (onnx_ir.DataType.UINT8, onnx_ir.DataType.INT8)
        integers = node.op_type == "DequantizeLinear" or any(v is not None and v.dtype in kept for v in node.inputs)
        return False if integers else None

    names = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about torch's own code
        exported = torch.onnx.export(program, **names, optimize=False, verbose=False)
    optimize_ir(exported.model, should_fold=from_integers)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(exported.model)  # stack traces, longer than a small network
    graph = exported.model.graph
    for value in (*graph.initializers.values(), *(value for node in graph for value in node.outputs)):
        if not value.is_graph_output():  # types and shapes, as long again, that follow from others
            value.type = value.shape = None
            value.metadata_props.clear()
    with abcnets._replacing(path) as temporary:
        exported.save(temporary, external_data=False)


def _inference_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


@torch.no_grad()
def _plain_program(abcnets, model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The model as operations that every exporter knows, for batches of any size."""
    model = _inference_copy(model)
    kinds = (abcnets.ABCConv1d, abcnets.ABCConv2d, abcnets.ABCConv3d, abcnets.ABCLinear)
    for layer in model.modules():
        if isinstance(layer, kinds) and layer.active:
            layer.weight = nn.Parameter(layer.quantized_weight(), requires_grad=False)
            layer.us = None
    # With flags in the place of words: no format has to be kept, and ONNX Runtime adds int64 only up to 53 bits.
    operators = torch.ops.abcnets
    plain = {
        operators.packed_conv.default: functools.partial(abcnets.packed_conv, as_flags=True),
        operators.packed_max_pool.default: functools.partial(abcnets.packed_max_pool, as_flags=True),
    }
    return _exported(model, example, plain)


@torch.no_grad()
def int8_program(abcnets, model: nn.Module, example: Tensor, calibration) -> tuple:
    """The model with 8-bit activations, which torch can run too, and a report of what became of its layers."""
    try:
        from . import int8
    except ImportError as error:
        raise ImportError(f"activations='int8' needs torch.ao, which this torch {torch.__version__} lacks: {error}"
                          ) from None  # fmt: skip
    _check_example(example)
    batches = list(_batches(calibration, example))
    model = _inference_copy(model)
    others = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} - {torch.float32}
    if others:
        raise ValueError(f"activations='int8' takes a model in float32, got {others.pop()}")
    active = [layer for layer in model.modules() if isinstance(layer, abcnets._ABCLayer) and layer.active]
    coded = [layer for layer in active if layer.us is None and layer.vs is not None]
    model = abcnets._replace(model, {layer: _Coded(abcnets, layer) for layer in coded})
    if any(layer.us is not None for layer in active):
        model = abcnets.pack(model)
    for layer in model.modules():
        if isinstance(layer, abcnets.PackedLayer):
            if layer.folded:
                raise ValueError("activations='int8' needs the packed model itself: in this one fuse made bits of what "
                                 "goes from layer to layer")  # fmt: skip
            layer.engine = "bits"  # one operator for each layer in the trace
    graph, report = int8.quantized(abcnets, _exported(model, example, {}), batches)
    return _exported(graph, example, {}), abcnets.Summary(report)


class _Coded(nn.Module):
    """A layer with float weights and a code on its activations, which is one operator in the trace."""

    def __init__(self, abcnets, layer: nn.Module):
        super().__init__()
        self.register_buffer("thresholds", abcnets._thresholds(layer.vs, layer.code[1]))
        self.register_buffer("half_steps", abcnets._half_steps(layer.betas, len(layer.vs)))
        layer.active, self.layer = False, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.ops.abcnets.staircase.default(x, self.thresholds, self.half_steps, self.layer.zero))


def _batches(calibration, example: Tensor):
    """The inputs that ranges are taken from, checked one by one."""
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    count = 0
    for batch in batches:
        batch = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(batch, Tensor) or batch.shape[1:] != example.shape[1:] or batch.dtype != example.dtype:
            got = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            wanted = ", ".join(["batch", *map(str, example.shape[1:])])
            raise ValueError(f"export_onnx takes calibration batches like its example, {example.dtype} ({wanted}); "
                             f"got {got}")  # fmt: skip
        if not batch.isfinite().all():
            raise ValueError("export_onnx was given a calibration batch that holds NaN or infinities")
        count += len(batch)
        if len(batch):
            yield batch.detach().cpu()
    if count == 0:
        raise ValueError("export_onnx needs at least one input to calibrate on, got none")


def _check_example(example) -> None:
    if not isinstance(example, Tensor) or example.ndim == 0 or len(example) == 0:
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"export_onnx needs a batch of at least one example input, got {got}")


def _exported(model: nn.Module, example: Tensor, decompositions: dict) -> torch.export.ExportedProgram:
    """The model's trace, for batches of any size, with some operators spelled out."""
    _check_example(example)
    # torch.export takes sizes 0 and 1 for constants: the example must be a batch of two or more.
    example = example.detach().cpu().expand(max(2, len(example)), *example.shape[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about torch's own code
            program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            return program.run_decompositions(decompositions)
    except Exception as error:
        raise ValueError(f"export_onnx traces the model with torch.export, which failed: {error}") from error

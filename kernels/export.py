"""One ONNX file of a model, in which packed weights stay bits and standard operators unpack them."""

import copy
import functools
import warnings

import torch
from torch import Tensor, nn


def export_onnx(abcnets, model: nn.Module, example_input: Tensor, path) -> None:
    """What `abcnets.export_onnx` documents; abcnets is the module whose layers the model is made of."""
    try:
        import onnx_ir
        import onnx_ir.passes.common
        from onnxscript.optimizer import optimize_ir
    except ImportError as error:
        raise ImportError(f"export_onnx needs two more packages, `pip install onnx onnxscript`: {error}") from None

    def from_bits(node) -> bool | None:  # folded into a constant, they would be 32 times as large
        bits = any(value is not None and value.dtype == onnx_ir.DataType.UINT8 for value in node.inputs)
        return False if bits else None

    names = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about torch's own code
        plain = _plain_program(abcnets, model, example_input)
        program = torch.onnx.export(plain, **names, optimize=False, verbose=False)
    optimize_ir(program.model, should_fold=from_bits)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # stack traces, longer than a small network
    with abcnets._replacing(path) as temporary:
        program.save(temporary, external_data=False)


@torch.no_grad()
def _plain_program(abcnets, model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The model in eval mode as operations that every exporter knows, for batches of any size."""
    if not isinstance(example, Tensor) or example.ndim == 0 or len(example) == 0:
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"export_onnx needs a batch of at least one example input, got {got}")
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    kinds = (abcnets.ABCConv1d, abcnets.ABCConv2d, abcnets.ABCConv3d, abcnets.ABCLinear)
    for layer in model.modules():
        if isinstance(layer, kinds) and layer.active:
            layer.weight = nn.Parameter(layer.quantized_weight(), requires_grad=False)
            layer.us = None
    # torch.export takes sizes 0 and 1 for constants: the example must be a batch of two or more.
    example = example.detach().cpu().expand(max(2, len(example)), *example.shape[1:])
    # With flags in the place of words: no format has to be kept, and ONNX Runtime adds int64 only up to 53 bits.
    operators = torch.ops.abcnets
    plain = {
        operators.packed_conv.default: functools.partial(abcnets.packed_conv, as_flags=True),
        operators.packed_max_pool.default: functools.partial(abcnets.packed_max_pool, as_flags=True),
    }
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        return program.run_decompositions(plain)
    except Exception as error:
        raise ValueError(f"export_onnx traces the model with torch.export, which failed: {error}") from error

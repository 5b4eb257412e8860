"""An exported model with 8-bit activations: the graph that ONNX Runtime runs in integers, as torch operators.

Activations become uint8 codes q with one scale s a tensor, R ~ s (q - z): in this project's words a binary code of
eight bases, beta = s (128, 64, ..., 1) / 2. Weights become int8 with one scale an output channel. Each value that is
rounded passes a pair quantize -> dequantize (QDQ), and so do weights and biases: in torch the graph simulates, in
float, what ONNX Runtime computes in integers once it has fused each convolution with the pairs around it.

    lower                       each convolution and linear layer is a `_Layer`, each code of activations a `_Staircase`
    fold_norms                  BatchNorm becomes part of the convolution before it
    make_layers_of_norms        or else a convolution of its own
    advance_relus               ReLU goes ahead of max-pool and reshaping: right behind a layer it costs nothing
    on_the_grid, paired         which values are codes, and where they are rounded
    scales                      in which steps: by torch.ao's histogram observer, on calibration batches
    insert_pairs                the pairs
"""

import copy
import functools
import itertools
import operator

import torch
import torch.ao.quantization.fx._decomposed  # defines the operators quantized_decomposed::*
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.observer import HistogramObserver

# Of the largest weight of a channel, on either side of 0. AVX2 has no dot product of bytes: it adds two products of an
# unsigned and a signed byte in 16 bits, which saturate, and two times 255 times 64 is the most that fits.
_LEVELS = 64
_BITS_UP_TO = 7  # bases; eight take as many bytes as int8

_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


# --------------------------------------------------------------------------- Layers


class _Layer(nn.Module):
    """A convolution or linear layer in float, on its way to integers.

    Shape: weight (O, C, *K); of a packed layer also bits (M, O, *K, bytes) and alphas (M, O), by which it is kept.
    """

    def __init__(self, abcnets, weight: Tensor, bias: Tensor | None, geometry: tuple, bits=None, alphas=None):
        super().__init__()
        self.unpack_bits = abcnets.unpack_bits
        self.weight, self.bias, self.geometry = weight.double(), None if bias is None else bias.double(), geometry
        self.bits, self.alphas = bits, None if alphas is None else alphas.double()
        self.M, self.dims = None if bits is None else len(bits), weight.ndim - 2

    @property
    def keeps_bits(self) -> bool:
        return self.M is not None and self.M <= _BITS_UP_TO

    def then(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply and shift what each channel puts out, as a BatchNorm does."""
        self.weight = self.weight * _per_channel(scale, self.weight)
        self.bias = shift + (0 if self.bias is None else self.bias * scale)
        if self.bits is not None:
            self.alphas = self.alphas * scale

    def quantized(self, input_scale: float) -> "_Int8Layer":
        """The layer with rounded weights and bias, for an input of that scale."""
        if not all(tensor.isfinite().all() for tensor in (self.weight, self.bias) if tensor is not None):
            raise ValueError("export_onnx can't round weights that are not finite, and a layer or its norm has such")
        scale = self.weight.abs().flatten(1).amax(1) / _LEVELS
        if self.bias is not None:  # one beside which the weights are next to nothing must not exceed int32
            scale = scale.maximum(self.bias.abs() / (input_scale * 2**30))
        scale = torch.where(scale > 1e-20, scale, 1.0).float()  # a channel of zeros
        if self.keeps_bits:
            signs = 2.0 * (torch.arange(2**self.M) >> torch.arange(self.M)[:, None] & 1) - 1
            levels = _rounded(self.alphas.t() @ signs.double(), scale, _LEVELS, torch.int8)
            weight = _Bits(self.unpack_bits, self.bits, levels, self.weight.shape)
        else:
            weight = _Integers(_rounded(self.weight, scale, _LEVELS, torch.int8))
        of_bias = scale * input_scale
        bias = None if self.bias is None else _rounded(self.bias, of_bias, 2**31 - 1, torch.int32)
        return _Int8Layer(weight, scale, bias, of_bias, self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        return _convolved(x, self.weight.float(), None if self.bias is None else self.bias.float(), self.geometry)


class _Int8Layer(nn.Module):
    """A layer whose weights are int8 and whose bias is int32, each channel with its scale."""

    def __init__(self, weight: nn.Module, scale: Tensor, bias: Tensor | None, bias_scale: Tensor, geometry: tuple):
        super().__init__()
        self.weight, self.geometry = weight, geometry
        self.register_buffer("scale", scale)
        # The zero of a linear layer's weights is spelled out: without it ONNX Runtime 1.32 makes no QGemm of them.
        self.register_buffer("zero", None if geometry else torch.zeros_like(scale, dtype=torch.int8))
        self.register_buffer("bias", bias)
        self.register_buffer("bias_scale", None if bias is None else bias_scale)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else _dequantized_channels(self.bias, self.bias_scale)
        return _convolved(x, _dequantized_channels(self.weight(), self.scale, self.zero), bias, self.geometry)


class _Integers(nn.Module):
    """Weights (O, C, *K) int8, as they are."""

    def __init__(self, integers: Tensor):
        super().__init__()
        self.register_buffer("integers", integers)

    def forward(self) -> Tensor:
        return self.integers


class _Bits(nn.Module):
    """Weights (O, C, *K) int8 from bits (M, O, *K, bytes): the M bits of a weight, the first one lowest, are the number
    of its level in the channel's row of levels (O, 2^M)."""

    def __init__(self, unpack_bits, bits: Tensor, levels: Tensor, shape: tuple):
        super().__init__()
        self.unpack_bits, self.shape = unpack_bits, shape
        self.register_buffer("bits", bits)
        self.register_buffer("levels", levels)

    def forward(self) -> Tensor:
        flags = self.unpack_bits(self.bits, self.shape[1]).long()
        number = functools.reduce(lambda high, flag: 2 * high + flag, flags.flip(0))
        return self.levels.gather(1, number.movedim(-1, 1).flatten(1)).view(self.shape)


class _Staircase(nn.Module):
    """Aq of a layer with a code on its activations, less the level of zero where it has one: a uint8 for each level.

    Levels are rounded to multiples of one scale, as coarse as they allow: 0, and what has equal distances, stay what
    they are. A NaN takes the lowest level.
    """

    def __init__(self, thresholds: Tensor, half_steps: Tensor, zero: Tensor | None):
        super().__init__()
        thresholds, order = thresholds.double().sort()
        half_steps = half_steps.double()[order]
        levels = F.pad(2 * half_steps.cumsum(0), (1, 0)) - half_steps.sum() - (0 if zero is None else zero.double())
        span = (levels.max().clamp(min=0) - levels.min().clamp(max=0)).clamp(min=1e-20)
        scales = span / torch.arange(1, 255)
        codes = (levels / scales[:, None]).round()
        error = (codes * scales[:, None] - levels).abs().amax(1) / span
        best = int((error <= error.min() + 1e-6).nonzero()[0])
        codes, self.scale = codes[best], float(scales[best].float())
        self.zero_point = int(-codes.min().clamp(max=0))
        self.thresholds, self.codes = thresholds.float().tolist(), (codes + self.zero_point).int().tolist()

    def forward(self, x: Tensor) -> Tensor:
        q, *above = (torch.tensor(code, dtype=torch.uint8) for code in self.codes)
        for threshold, code in zip(self.thresholds, above):
            q = torch.where(x >= threshold, code, q)
        return _dequantized(q, self.scale, self.zero_point)

    def on_codes(self, scale: float, zero_point: int) -> "_Staircase":
        """The same for the codes of a value in the place of the value."""
        values = _DEQUANTIZE(torch.arange(256, dtype=torch.uint8), scale, zero_point, 0, 255, torch.uint8)
        other = copy.copy(self)
        reached = [(values >= threshold).nonzero().flatten()[:1].tolist() for threshold in self.thresholds]
        other.thresholds = [torch.tensor(first, dtype=torch.uint8) for codes in reached for first in codes]
        return other

    def range(self) -> tuple[float, float]:
        """What a value must span to be compared with the thresholds; beyond it nothing changes any more."""
        low, high = min(self.thresholds), max(self.thresholds)
        room = max(high - low, abs(high), 1e-3) / 100
        return low - room, high + room


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:
    """A convolution; without a geometry a linear layer, always of two dimensions, which is one operator in ONNX."""
    if geometry:
        return (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3](x, weight, bias, *geometry)
    if x.ndim == 2:
        return F.linear(x, weight, bias)
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _rounded(x: Tensor, scale: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    return (x / _per_channel(scale.double(), x)).round().clamp(-most, most).to(dtype)


def _dequantized_channels(integers: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    limits = torch.iinfo(integers.dtype)
    operators = torch.ops.quantized_decomposed
    return operators.dequantize_per_channel(integers, scale, zero, 0, limits.min, limits.max, integers.dtype)


def _dequantized(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return _DEQUANTIZE(q, scale, zero_point, 0, 255, torch.uint8)


# --------------------------------------------------------------------------- The graph

_aten = torch.ops.aten
_CONVOLUTIONS = {
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default,
    _aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding,
}  # fmt: skip
_NORM = _aten._native_batch_norm_legit_no_training.default
_MAX_POOLS = {_aten.max_pool1d.default: 1, _aten.max_pool2d.default: 2, _aten.max_pool3d.default: 3}
# What hands values on as they are: codes stay codes.
_PASSING = _MAX_POOLS.keys() | {
    _aten.reshape.default, _aten.flatten.using_ints, _aten.permute.default,
    _aten.transpose.int, _aten.squeeze.dims, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.clone.default,
    _aten.slice.Tensor, _aten.select.int,
}  # fmt: skip
_RELUS = {_aten.relu.default, _aten.relu6.default, _aten.hardtanh.default}
_POOLS = {
    _aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default, _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default, _aten.adaptive_avg_pool3d.default,
}  # fmt: skip


def quantized(abcnets, program: torch.export.ExportedProgram, batches) -> tuple[torch.fx.GraphModule, list[dict]]:
    """The program with int8 weights and 8-bit activations in the range that they have on the batches; and a report.

    Args:
        abcnets: the module whose operators the program calls.
        program: with one packed_conv for each packed layer, floats between them.
        batches: tensors that the program takes.

    Returns: a graph of torch operators, quantize and dequantize pairs among them, and a row for each layer and each
        operator that stays float.
    """
    graph_module = program.run_decompositions({}).module(check_guards=False)
    return _Quantization(abcnets, graph_module).run(batches)


class _Quantization:
    """A program's graph, from floats to pairs."""

    def __init__(self, abcnets, graph_module: torch.fx.GraphModule):
        self.abcnets, self.graph_module, self.graph = abcnets, graph_module, graph_module.graph
        self.why = {}  # a node has no int8 form, where there is more to say than that

    @torch.no_grad()
    def run(self, batches) -> tuple[torch.fx.GraphModule, list[dict]]:
        self.lower()
        self.fold_norms()
        self.advance_relus()
        grid = self.on_the_grid()
        self.make_layers_of_norms(grid)
        self.graph.eliminate_dead_code()
        self.graph_module.recompile()
        report, pairs = self.report(grid), self.paired(grid)
        self.insert_pairs(pairs, self.scales(grid, pairs, batches))
        self.graph_module.delete_all_unused_submodules()
        self.graph_module.recompile()
        return self.graph_module, report

    # Nodes

    def module_of(self, node, kind: type) -> nn.Module | None:
        module = self.graph_module.get_submodule(node.target) if node.op == "call_module" else None
        return module if isinstance(module, kind) else None

    def tensor_of(self, node) -> Tensor | None:
        """The constant that a node stands for; None for no node, or for another."""
        if node is None or node.op != "get_attr":
            return None
        return operator.attrgetter(node.target)(self.graph_module).detach()

    def call(self, path: str, module: nn.Module, source, before):
        """A call of a new module on a value, in front of a node."""
        taken = {name for name, _ in self.graph_module.named_modules()}
        path = next(p for p in itertools.chain([path], (f"{path}_{i}" for i in itertools.count(2))) if p not in taken)
        self.graph_module.add_submodule(path, module)
        with self.graph.inserting_before(before):
            node = self.graph.call_module(path, (source,))
        node.meta = dict(source.meta)
        return node

    def replace(self, node, by) -> None:
        by.meta = dict(node.meta)
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    # Layers

    def lower(self) -> None:
        """Make a `_Layer` of each convolution and linear layer whose weight is a constant."""
        for node in list(self.graph.nodes):
            if node.target in (_aten.view.default, _aten._unsafe_view.default):
                node.target = _aten.reshape.default  # the layers in front may lay out their output in another order
            elif node.target in _CONVOLUTIONS or node.target is _aten.linear.default:
                self.lower_float(node)
            elif node.target is torch.ops.abcnets.packed_conv.default:
                self.lower_packed(node)
            elif node.target is torch.ops.abcnets.staircase.default:
                x, *tensors, zero = node.args
                tensors = [self.tensor_of(tensor) for tensor in tensors]
                staircase = _Staircase(*tensors, self.abcnets._level_of_zero(*tensors) if zero else None)
                self.replace(node, self.call(f"{_path(node.args[1].target)}.code".lstrip("."), staircase, x, node))

    def lower_float(self, node) -> None:
        x, weight_node, bias_node, *geometry = [*node.args, None][: max(3, len(node.args))]
        weight, bias = self.tensor_of(weight_node), self.tensor_of(bias_node)
        if weight is None or (bias is None) != (bias_node is None):
            self.why[node] = "its weight is computed"
            return
        dims = weight.ndim - 2
        if dims:
            defaults = [[1] * dims, [0] * dims, [1] * dims, 1]
            stride, padding, *rest = [*geometry, *defaults[len(geometry) :]]
            if padding == "same":
                totals = [d * (k - 1) for d, k in zip(rest[0], weight.shape[2:])]
                pairs = [(total // 2, total - total // 2) for total in totals]
            else:
                pairs = [(p, p) for p in ([0] * dims if padding == "valid" else padding)]
            x, geometry = self.padded(x, pairs, node, stride, *rest)
        name = _path(weight_node.target)
        self.replace(node, self.call(f"{name}.int8".lstrip("."), _Layer(self.abcnets, weight, bias, geometry), x, node))

    def lower_packed(self, node) -> None:
        x, *tensors, channels, stride, padding, dilation, groups, _, _, _ = node.args
        name = _path(node.args[1].target)
        bits, alphas, betas, thresholds, _, bias, zero = map(self.tensor_of, tensors)
        if len(betas):
            steps = self.abcnets._half_steps(betas, len(thresholds))
            x = self.call(f"{name}.code".lstrip("."), _Staircase(thresholds, steps, zero), x, node)
        geometry = ()
        if stride:
            pairs = list(zip(padding[::2], padding[1::2]))
            x, geometry = self.padded(x, pairs, node, stride, dilation, groups)
        weight = self.abcnets._unpack_weight(bits, alphas.double(), channels // groups)
        layer = _Layer(self.abcnets, weight, bias, geometry, bits, alphas)
        self.replace(node, self.call(f"{name}.int8".lstrip("."), layer, x, node))

    def padded(self, x, pairs, node, stride, dilation, groups):
        """What a convolution reads, padded where it can't do so itself, and its geometry."""
        if all(low == high for low, high in pairs):
            return x, (stride, [low for low, _ in pairs], dilation, groups)
        sizes = [size for pair in reversed(pairs) for size in pair]
        with self.graph.inserting_before(node):
            pad = self.graph.call_function(_aten.constant_pad_nd.default, (x, sizes, 0.0))
        pad.meta = dict(x.meta)
        return pad, (stride, [0] * len(pairs), dilation, groups)

    # Norms and ReLUs

    def fold_norms(self) -> None:
        """Fold each BatchNorm into the layer that alone feeds it; a rising one through a max-pool too."""
        for norm, output in self.norms():
            source, scale, shift = norm.args[0], *self.scale_and_shift(norm)
            fed_by = source
            if _MAX_POOLS.get(source.target) == _ndim(source) - 2 and len(source.users) == 1 and (scale >= 0).all():
                fed_by = source.args[0]
            layer = self.module_of(fed_by, _Layer)
            if layer is None or len(fed_by.users) > 1 or _ndim(fed_by) != layer.dims + 2:
                continue
            layer.then(scale, shift)
            output.replace_all_uses_with(source)
            self.graph.erase_node(output)
            self.graph.erase_node(norm)

    def make_layers_of_norms(self, grid: set) -> None:
        """A BatchNorm that nothing could take in is a depthwise convolution with kernels of one weight."""
        for norm, output in self.norms():
            if norm in grid:
                scale, shift = self.scale_and_shift(norm)
                dims = _ndim(norm.args[0]) - 2
                geometry = [1] * dims, [0] * dims, [1] * dims, len(scale)
                layer = _Layer(self.abcnets, scale.view(-1, *[1] * (dims + 1)), shift, geometry)
                name = _path(norm.args[3].target)
                node = self.call(f"{name}.int8".lstrip("."), layer, norm.args[0], norm)
                self.replace(output, node)
                self.graph.erase_node(norm)
                grid.discard(norm), grid.discard(output), grid.add(node)

    def norms(self) -> list[tuple]:
        """The BatchNorms whose statistics are constants, each with the node that stands for its result."""
        norms = [node for node in self.graph.nodes if node.target is _NORM and self.tensor_of(node.args[3]) is not None]
        return [(norm, next(iter(norm.users))) for norm in norms]

    def scale_and_shift(self, norm) -> tuple[Tensor, Tensor]:
        weight, bias, mean, var = (self.tensor_of(node) for node in norm.args[1:5])
        scale = (var.double() + norm.args[6]).rsqrt() * (1 if weight is None else weight)
        return scale, (0 if bias is None else bias) - mean * scale

    def advance_relus(self) -> None:
        """relu(f(x)) = f(relu(x)) where f only chooses values: there the layer in front rounds to codes above 0."""
        for node in list(self.graph.nodes):
            while node.target in _RELUS and node.args[0].target in _PASSING and len(node.args[0].users) == 1:
                chooses = node.args[0]
                with self.graph.inserting_before(chooses):
                    earlier = self.graph.call_function(node.target, (chooses.args[0], *node.args[1:]), node.kwargs)
                earlier.meta = dict(chooses.args[0].meta)
                chooses.replace_input_with(chooses.args[0], earlier)
                self.replace(node, chooses)
                node = earlier

    # Codes

    def on_the_grid(self) -> set:
        """The nodes whose values are codes, or would be, but for a ReLU behind them that rounding takes in."""
        grid = set()
        for node in self.graph.nodes:
            sources = node.all_input_nodes
            if node.op == "placeholder" or (layer := self.module_of(node, _Layer)) and layer.dims == 0:
                on_it = self.is_needed(node)  # a linear layer may put out floats at no cost
            elif node.op == "call_module":
                on_it = isinstance(self.graph_module.get_submodule(node.target), (_Layer, _Staircase))
            elif node.target is _NORM:
                on_it = sources[0] in grid and 3 <= _ndim(sources[0]) <= 5
            elif node.target in (_aten.add.Tensor, _aten.cat.default):
                parts = node.args if node.target is _aten.add.Tensor else node.args[0]
                on_it = all(part in grid for part in parts) and not node.kwargs
            else:
                on_it = (_chooses(node) or node.target in _RELUS | _POOLS | {operator.getitem}) and sources[0] in grid
            if on_it:
                grid.add(node)
        return grid

    def is_needed(self, node) -> bool:
        """Whether a layer or a sum reads a value, perhaps behind what codes pass through."""
        for user in node.users:
            if self.module_of(user, _Layer) or user.target in (_aten.add.Tensor, _aten.cat.default):
                return True
            if (_chooses(user) or user.target in _RELUS | _POOLS) and self.is_needed(user):
                return True
        return False

    def paired(self, grid: set) -> dict:
        """{node: the users that shall get its code} for all values that are to be rounded."""
        pairs = {}
        for node in self.graph.nodes:
            users = list(node.users)
            taken_in = len(users) == 1 and users[0].target in _RELUS
            if node in grid and not taken_in and self.module_of(node, _Staircase) is None:
                pairs[node] = users
            elif node not in grid and any(self.module_of(user, _Layer) for user in users):
                pairs[node] = [user for user in users if self.module_of(user, _Layer)]
        return pairs

    def scales(self, grid: set, pairs: dict, batches) -> dict:
        """{node: (scale, zero point)}"""
        scales, observers = {}, {}
        for node in self.graph.nodes:
            staircase = self.module_of(node, _Staircase)
            if staircase is not None:
                scales[node] = staircase.scale, staircase.zero_point
            elif node in pairs and not (node in grid and _chooses(node)):
                compared = self.compared_range(node)
                if compared is None:
                    observers[node] = HistogramObserver(dtype=torch.quint8, quant_min=0, quant_max=255)
                else:
                    scales[node] = _scale_and_zero_point(*compared)
        interpreter = _Observing(self.graph_module, observers)
        for batch in batches:
            interpreter.run(batch)
        for node, observer in observers.items():
            scale, zero_point = observer.calculate_qparams()
            scales[node] = float(scale), int(zero_point)
        for node in self.graph.nodes:
            if node in pairs and node not in scales:
                scales[node] = scales[node.all_input_nodes[0]]
        return scales

    def compared_range(self, node) -> tuple[float, float] | None:
        """What a value must span, where it is only compared with thresholds: beyond them nothing changes."""
        ranges = []
        for user in node.users:
            staircase = self.module_of(user, _Staircase)
            ranges.append(staircase.range() if staircase else self.compared_range(user) if _chooses(user) else None)
        if not ranges or None in ranges:
            return None
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        return (0.0, max(high, 1e-3)) if node.target is _aten.relu.default else (min(low, 0.0), max(high, 0.0))

    def insert_pairs(self, pairs: dict, scales: dict) -> None:
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        for node in list(self.graph.nodes):
            layer = self.module_of(node, _Layer)
            if layer is not None:
                self.graph_module.set_submodule(node.target, layer.quantized(scales[node.args[0]][0]))
        for node, users in pairs.items():
            with self.graph.inserting_after(node):
                codes = self.graph.call_function(quantize, (node, *scales[node], 0, 255, torch.uint8))
            with self.graph.inserting_after(codes):
                value = self.graph.call_function(_DEQUANTIZE, (codes, *scales[node], 0, 255, torch.uint8))
            for user in users:
                staircase = self.module_of(user, _Staircase)
                if staircase is not None:
                    self.graph_module.set_submodule(user.target, staircase.on_codes(*scales[node]))
                user.replace_input_with(node, value if staircase is None else codes)

    def report(self, grid: set) -> list[dict]:
        rows = []
        for node in self.graph.nodes:
            layer = self.module_of(node, _Layer)
            if layer is not None:
                kind = "Linear" if layer.dims == 0 else f"Conv{layer.dims}d"
                stored = "bits" if layer.keeps_bits else "int8"
                names = {"layer": _path(node.target), "kind": kind, "M": layer.M}
                rows.append({**names, "stored": stored, "runs": "int8", "why": None})
            elif node.op == "call_function" and node not in grid and _is_float(node) and node.target not in _PASSING:
                names = [_path(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
                kind = node.target.__name__.partition(".")[0]
                why = self.why.get(node, "no int8 form here")
                names = {"layer": names[0] if names else node.name, "kind": kind, "M": None}
                rows.append({**names, "stored": None, "runs": "float", "why": why})
        return rows


class _Observing(torch.fx.Interpreter):
    """Runs a graph and shows the values of some nodes to their observers."""

    def __init__(self, graph_module: torch.fx.GraphModule, observers: dict):
        super().__init__(graph_module)
        self.observers, self.extra_traceback = observers, False

    def run_node(self, node):
        value = super().run_node(node)
        if node in self.observers:
            if not value.isfinite().all():
                raise ValueError(f"export_onnx can't round what is not finite: {node.name} on a calibration batch")
            self.observers[node](value)
        return value


def _scale_and_zero_point(low: float, high: float) -> tuple[float, int]:
    scale = (high - low) / 255
    return scale, round(-low / scale)


def _ndim(node) -> int:
    return node.meta["val"].ndim


def _is_float(node) -> bool:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_pad(node) -> bool:
    """Whether a node pads by 0, which has a code, or by what is there."""
    is_pad = node.target in (_aten.pad.default, _aten.constant_pad_nd.default)
    value = node.args[-1] if is_pad and len(node.args) > 2 else 0
    return is_pad and (isinstance(value, str) or value in (0, None)) and not node.kwargs


def _chooses(node) -> bool:
    """Whether what a node puts out are values that it is given, or zeros."""
    return node.target in _PASSING or _is_pad(node)


def _path(name: str) -> str:
    """The layer that a tensor or a module of ours belongs to."""
    return name.rpartition(".")[0]

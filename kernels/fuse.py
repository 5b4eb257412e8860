"""Bits from layer to layer: BatchNorm, ReLU and max-pool of a packed model become thresholds and ORs (torch.fx).

Between two packed layers, whatever is elementwise and monotone in each channel (BatchNorm, ReLU and its kin, the
identity of Dropout) is followed by a comparison with the next layer's thresholds, so it only moves these: each channel
of the earlier layer's output is compared once a base, with a constant that folds all of it in, and max-pool commutes
with the comparison. No float tensor is written on the way. Behind any other producer (the first, float convolution; a
residual sum) the same modules fold into the packed layer's own thresholds, if nobody else uses them. A BatchNorm whose
result is needed in float folds into the scales and bias of the convolution in front of it.

The folded thresholds are found by bisection over the floats with the very modules they replace, so that they decide as
those do, to the last bit.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse(abcnets, model: nn.Module) -> torch.fx.GraphModule:
    """What `abcnets.fuse` documents; abcnets is the module whose packed layers the model is made of."""
    return _Fusion(abcnets, copy.deepcopy(model).eval()).run()


class _Fusion:
    """A traced copy of a packed model, in which chains of modules are replaced by thresholds."""

    def __init__(self, abcnets, model: nn.Module):
        self.packed_layer = abcnets.PackedLayer
        if any(self.is_packed(module) and module.fused for module in model.modules()):
            raise ValueError("fuse takes what pack or load_packed returned; this model is fused already")
        try:
            graph = _tracer(abcnets).trace(model)
        except Exception as error:
            raise ValueError(f"fuse traces the model with torch.fx, which failed: {error}") from error
        self.fused = torch.fx.GraphModule(model, graph)

    def run(self) -> torch.fx.GraphModule:
        nodes = list(self.fused.graph.nodes)
        for node in nodes:
            layer = self.module_of(node)
            if self.is_packed(layer) and self.takes_bits(layer):
                self.fold_input(node, layer)
        for node in nodes:
            if type(self.module_of(node)) in _BATCH_NORMS:
                self.fold_norm(node)
        self.fused.graph.eliminate_dead_code()
        self.fused.delete_all_unused_submodules()
        self.fused.recompile()
        for module in self.fused.modules():
            if self.is_packed(module):
                module.fused = True
        return self.fused

    def module_of(self, node) -> nn.Module | None:
        return self.fused.get_submodule(node.target) if node.op == "call_module" else None

    def is_packed(self, module) -> bool:
        return isinstance(module, self.packed_layer)

    @staticmethod
    def takes_bits(layer) -> bool:
        has_bases = layer.activation_bases is not None
        return has_bases and layer.runs_bits() and layer.padding_mode == "zeros" and layer.groups == 1

    def fold_input(self, node, layer) -> None:
        """Fold what lies between a packed layer and its producer into thresholds: the producer's, or else its own."""
        chain, producer = self.monotone_chain(node)
        producing = self.module_of(producer)
        pools = [i for i, link in enumerate(chain) if self.pool_of(link)]
        if self.is_packed(producing) and producing.runs_bits() and len(producer.users) == 1:
            functions = [self.function_of(link) for link in chain]
            producing.out_thresholds, producing.out_flips = fold(functions, layer)
            producing.folded = layer.folded = True
            source = producer
            for i in pools:
                after = fold(functions[i + 1 :], layer)[1]  # the direction of what follows the pool
                source = self.insert_pool(chain[i], source, after, layer.channels)
        else:
            rest = chain[pools[-1] + 1 :] if pools else chain
            layer.in_thresholds, layer.in_flips = fold([self.function_of(link) for link in rest], layer)
            layer.folded = True
            source = chain[pools[-1]] if pools else producer
        node.replace_input_with(node.args[0], source)

    def fold_norm(self, node) -> None:
        """Fold a BatchNorm whose float output is wanted into the convolution that feeds it alone, packed or stock."""
        norm, producer = self.module_of(node), node.args[0]
        layer = self.module_of(producer)
        if len(producer.users) > 1 or not norm.track_running_stats:
            return
        if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            self.fused.set_submodule(producer.target, torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm))
        elif self.is_packed(layer) and layer.spatial_dims > 0:
            scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
            shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
            layer.alphas = layer.alphas * scale
            layer.bias = shift if layer.bias is None else layer.bias * scale + shift
            layer.refresh()
        else:
            return
        node.replace_all_uses_with(producer)

    def monotone_chain(self, node) -> tuple[list, torch.fx.Node]:
        """The single-use links in front of a node that only move its thresholds, first to last, and what feeds them."""
        chain = []
        link = node.args[0]
        while len(link.users) == 1 and (self.function_of(link) or self.pool_of(link)):
            chain.insert(0, link)
            link = link.args[0]
        return chain, link

    def function_of(self, node):
        """What a node does to a tensor with channels in dimension 1, where that is monotone; else None."""
        module = self.module_of(node)
        if type(module) in _MONOTONE_MODULES:
            return module
        if type(module) in _BATCH_NORMS and module.track_running_stats:
            statistics = (module.running_mean, module.running_var, module.weight, module.bias)
            return lambda z: F.batch_norm(z, *statistics, eps=module.eps)
        if node.op in ("call_function", "call_method") and node.target in _RELUS:
            return torch.relu
        return None

    def pool_of(self, node) -> nn.Module | None:
        module = self.module_of(node)
        return module if type(module) in _POOLS and not module.return_indices else None

    def insert_pool(self, link, source, flips: Tensor, channels: int):
        """A max-pool of words in the place of one of floats."""
        pool = self.pool_of(link)
        dims = _POOLS[type(pool)]
        sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        sizes = [[size] * dims if isinstance(size, int) else list(size) for size in sizes]
        name = f"{link.name}_flips"
        self.fused.register_buffer(name, flips, persistent=False)
        graph = self.fused.graph
        with graph.inserting_after(source):
            flips_node = graph.get_attr(name)
        with graph.inserting_after(flips_node):
            arguments = (source, flips_node, channels, *sizes, pool.ceil_mode)
            return graph.call_function(torch.ops.abcnets.packed_max_pool.default, arguments)


def _tracer(abcnets) -> torch.fx.Tracer:
    whole = (abcnets.PackedLayer, abcnets.ABCConv1d, abcnets.ABCConv2d, abcnets.ABCConv3d, abcnets.ABCLinear)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, whole) or super().is_leaf_module(module, name)

    return Tracer()


# Non-decreasing, elementwise. BatchNorm is monotone in each channel, in either direction.
_MONOTONE_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


def fold(functions: list, layer) -> tuple[Tensor, Tensor]:
    """Thresholds (N, C) and flips (C,) on z with (z >= thresholds) != flips where f(z) >= the layer's own thresholds.

    f, the composition, is monotone in each channel, so each threshold is the smallest float32 for which a comparison
    comes true (or, in a falling channel, ceases to be true). Floats are ordered like their bits, which makes bisection
    32 evaluations. Max-pools have no entry: they commute.
    """
    N, C = len(layer.thresholds), layer.channels
    wanted = layer.thresholds[:, None]

    def f(z):
        for function in functions:
            z = z if function is None else function(z)
        return z

    extreme = torch.finfo(torch.float32).max
    low, high = (f(wanted.new_full((1, C), value))[0] for value in (-extreme, extreme))
    flips = high < low

    def passed(key):  # monotone in the key: False, then True
        return (f(_float_of_key(key)) >= wanted) != flips

    infinity = _key_of_float(wanted.new_tensor(math.inf))
    below = wanted.new_zeros((N, C), dtype=torch.int64) - infinity - 1  # one step below -inf: never passed
    above = torch.zeros_like(below) + infinity  # if nothing smaller passes, +inf is the threshold
    below_all = passed(-infinity.expand(N, C))
    while (above - below > 1).any():
        middle = torch.div(below + above, 2, rounding_mode="floor")
        is_true = passed(middle.clamp(min=-infinity))
        above, below = torch.where(is_true, middle, above), torch.where(is_true, below, middle)
    return torch.where(below_all, -math.inf, _float_of_key(above.clamp(min=-infinity))), flips


def _key_of_float(x: Tensor) -> Tensor:
    """An integer that is ordered as the float32 is: its bits, the magnitude negated below zero."""
    bits = x.view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _float_of_key(key: Tensor) -> Tensor:
    bits = torch.where(key < 0, -key | -0x80000000, key)
    return bits.to(torch.int32).view(torch.float32)

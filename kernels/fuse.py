"""Bits from layer to layer: BatchNorm, ReLU and max-pool of a packed model become thresholds and ORs (torch.fx).

Between two packed layers, whatever is elementwise and monotone in each channel (BatchNorm, ReLU and its kin, the
identity of Dropout) is followed by a comparison with the next layer's thresholds, so it only moves these: each channel
of the earlier layer's output is compared once a base, with a constant that folds all of it in, and max-pool commutes
with the comparison. No float tensor is written on the way. Behind any other producer (the first, float convolution; a
residual sum) the same modules fold into the packed layer's own thresholds, if nobody else uses them. A BatchNorm whose
result is needed in float folds into the scales and bias of the convolution in front of it.

Layers and pools that only read one another become the steps of one module, a PackedChain, with the float layers
at the ends of a network: a convolution of few channels and its max-pool in front of them, behind them a max-pool, ReLU,
flattening and a linear layer. An engine runs it in one call (cpu/chain.py). The first convolution and its max-pool
become such a module even alone. Where what such a module, or a layer, puts out is only read by a sum, it adds the other
summand itself, and applies the ReLU behind. At the end those that read one another's floats, as blocks of a residual
network do, become one, with shortcuts that average and the mean at the end: a network, or what of it lies between other
operations, is one call.

The folded thresholds are found by bisection over the floats with the very modules they replace, so that they decide as
those do, to the last bit.

What has to hold, or everything stays as it is:

- a layer that is changed is called once, by nobody but the graph, and nobody looks at what goes into it or comes out;
- what is taken away had one reader, and no memory that it or its input lies in is written to by others (tracing.py);
- a norm runs over the layer's own channels. Which dimension these are in depends on whether there is a batch, so a
  layer with a norm or a pool folded in takes batches only (`PackedLayer.batched`).
"""

import copy
import math
import operator
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tracing import (
    BATCH_NORMS,
    CONVOLUTIONS,
    IDENTITIES,
    IN_PLACE,
    MONOTONE_MODULES,
    POOLS,
    RELUS,
    Memory,
    argument,
    is_of_attribute,
    is_watched,
    trace,
)


def fuse(abcnets, model: nn.Module, rest: str = "float") -> torch.fx.GraphModule:
    """What `abcnets.fuse` documents; abcnets is the module whose packed layers the model is made of."""
    if rest not in ("float", "int8"):
        raise ValueError(f'rest should be "float" or "int8", got {rest!r}')
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(f"fuse works on a copy of the model, which can't be made: {error}") from error
    return _Fusion(abcnets, model, rest == "int8").run()


class _Fusion:
    """A traced copy of a packed model, in which chains of modules are replaced by thresholds."""

    def __init__(self, abcnets, model: nn.Module, in_eight_bits: bool):
        self.abcnets, self.packed_layer, self.in_eight_bits = abcnets, abcnets.PackedLayer, in_eight_bits
        _check_model(model, [layer for layer in model.modules() if self.is_packed(layer)])
        self.fused = trace(abcnets, model)
        self.memory = Memory(self.fused.graph, self.module_of, self.packed_layer)
        self.check_own_tensors()
        calls = [self.module_of(node) for node in self.fused.graph.nodes if node.op == "call_module"]
        self.called_once = {module for module in calls if calls.count(module) == 1}
        self.seen = {child for module in calls for child in module.modules() if child is not module}
        for node in self.fused.graph.nodes:  # a module whose tensors the model itself reads
            if node.op == "get_attr":
                self.seen.add(self.fused.get_submodule(node.target.rpartition(".")[0]))

    def check_own_tensors(self) -> None:
        """A tensor of the model's own, or that forward makes without its input, is the same one in all calls."""
        for node in self.fused.graph.nodes:
            kept = [source for source in self.memory.writes_to(node) if is_of_attribute(source)]
            if node.op == "output":
                kept = [value for value in node.all_input_nodes if str(value.target).startswith("_tensor_constant")]
            if kept:
                raise ValueError(
                    f"fuse needs a forward pass that leaves the model's own tensors alone, but {node.name} changes or "
                    f"hands out {kept[0].name}; what forward makes without its input is such a tensor too: make it of "
                    "that, as torch.zeros_like(x) does"
                )

    def run(self) -> torch.fx.GraphModule:
        for node in list(self.fused.graph.nodes):
            layer = self.module_of(node)
            if self.is_packed(layer) and self.is_own(layer) and self.takes_bits(layer):
                self.fold_input(node, layer)
        for node in list(self.fused.graph.nodes):
            if type(self.module_of(node)) in BATCH_NORMS:
                self.fold_norm(node)
        self.chain_steps()
        for node in list(self.fused.graph.nodes):
            if node.target in _SUMS:
                self.fold_sum(node)
        self.join_chains()
        if self.in_eight_bits and not any(isinstance(m, self.abcnets.EightBitConv) for m in self.fused.modules()):
            needs = "a convolution of at most four channels that begins a chain, AVX-512 VNNI, and numba"
            warnings.warn(f'fuse: rest="int8" changes nothing here: it takes {needs}', stacklevel=4)
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

    def is_own(self, module) -> bool:
        """Whether a module is called once, and by this graph alone: one that can be changed."""
        return module in self.called_once and self.is_plain(module)

    def is_plain(self, module) -> bool:
        """Whether nobody else calls a module, reads its tensors or has hooks on it: one that can be left out."""
        return module not in self.seen and not is_watched(module)

    def takes_bits(self, layer) -> bool:
        has_bases = type(layer) is self.packed_layer and layer.activation_bases is not None
        return has_bases and layer.runs_bits() and layer.padding_mode == "zeros" and layer.groups == 1

    def fold_input(self, node, layer) -> None:
        """Fold what lies between a packed layer and its producer into thresholds: the producer's, or else its own."""
        chain, producer = self.monotone_chain(node, layer)
        pools = [i for i, link in enumerate(chain) if self.pool_of(link, layer.spatial_dims)]
        hands_on_bits = producer is not None and self.hands_on_bits(producer, layer)
        if pools and not hands_on_bits:
            producer, chain, pools = chain[pools[-1]], chain[pools[-1] + 1 :], []
        folds = [self.folded(chain[start:], layer) for start in (0, *(i + 1 for i in pools))]
        if producer is None or None in folds:
            return
        source, changed = producer, self.module_of(producer) if hands_on_bits else layer
        changed.batched |= any(type(self.module_of(link)) in (*BATCH_NORMS, *POOLS) for link in chain)
        layer.folded = changed.folded = True
        if hands_on_bits:
            changed.out_thresholds, changed.out_flips = folds[0]
            changed.out_bases = layer.activation_bases
            for i, (_, flips) in zip(pools, folds[1:]):  # the direction of what follows the pool
                source = self.insert_pool(chain[i], source, flips, layer)
        else:
            layer.in_thresholds, layer.in_flips = folds[0]
        node.replace_input_with(node.args[0], source)
        for link in reversed(chain):
            self.fused.graph.erase_node(link)

    def hands_on_bits(self, producer, layer) -> bool:
        """Whether what comes is a packed layer's output, in the same dimensions, and nobody else reads it."""
        producing = self.module_of(producer)
        if type(producing) is not self.packed_layer or not self.is_own(producing) or len(producer.users) > 1:
            return False
        fits = (producing.spatial_dims, producing.out_channels) == (layer.spatial_dims, layer.channels)
        return fits and producing.runs_bits()

    def folded(self, chain, layer) -> tuple[Tensor, Tensor] | None:
        return fold([self.function_of(link, layer) for link in chain], layer)

    def fold_norm(self, node) -> None:
        """Fold a BatchNorm whose float output is wanted into the convolution that feeds it alone, packed or stock."""
        norm, producer = self.module_of(node), argument(node)
        layer = None if producer is None else self.module_of(producer)
        if layer is None or not self.is_own(layer) or len(producer.users) > 1:
            return
        is_packed = type(layer) is self.packed_layer
        dims = layer.spatial_dims if is_packed else CONVOLUTIONS.get(type(layer), 0)
        if dims == 0 or self.statistics(node, dims, layer.out_channels) is None:
            return
        scale, shift = _scales_of(norm, *self.statistics(node, dims, layer.out_channels))
        if scale is None:
            return
        if is_packed:
            layer.alphas = layer.alphas * scale
            layer.bias = shift if layer.bias is None else layer.bias * scale + shift
            layer.batched = True
            layer.refresh()
        elif dims > 1:  # a stock one can't ask for a batch; in two or more dimensions the norm did
            folded = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
            self.fused.set_submodule(producer.target, folded)
            self.called_once.add(folded)
        else:
            return
        self.put_in_the_place_of(node, producer)

    def monotone_chain(self, node, layer) -> tuple[list, torch.fx.Node | None]:
        """The single-use links in front of a node that only move its thresholds, first to last, and what feeds them."""
        chain, link = [], argument(node)
        while link is not None and len(link.users) == 1 and self.is_link(link, layer):
            source = argument(link)
            if source is None or not self.memory.is_constant(source) or not self.memory.is_constant(link):
                break
            chain.insert(0, link)
            link = source
        return chain, link

    def is_link(self, node, layer) -> bool:
        return self.function_of(node, layer) is not None or self.pool_of(node, layer.spatial_dims) is not None

    def function_of(self, node, layer):
        """What a node does to a tensor with the layer's channels in dimension 1, where that is monotone; else None."""
        module = self.module_of(node)
        if module is not None and not self.is_plain(module):
            return None
        if type(module) in MONOTONE_MODULES:
            return module
        statistics = self.statistics(node, layer.spatial_dims, layer.channels)
        if statistics is not None:
            return lambda z: F.batch_norm(z, *statistics, eps=module.eps)
        if node.op in ("call_function", "call_method") and node.target in RELUS:
            return torch.relu
        return None

    def statistics(self, node, dims: int, channels: int) -> tuple | None:
        """Mean, variance, weight and bias of a BatchNorm over the channels of layers of so many dimensions."""
        norm = self.module_of(node)
        if dims not in BATCH_NORMS.get(type(norm), ()) or norm.num_features != channels or not self.is_plain(norm):
            return None
        tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
        kept = all(tensor is not None for tensor in tensors[:2])
        return tensors if kept and all(t is None or t.dtype == torch.float32 for t in tensors) else None

    def pool_of(self, node, dims: int) -> nn.Module | None:
        module = self.module_of(node)
        if POOLS.get(type(module)) != dims or module.return_indices or not self.is_plain(module):
            return None
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        is_known = all(isinstance(size, int) or len(size) == dims for size in sizes)
        return module if is_known else None

    def insert_pool(self, link, source, flips: Tensor, layer):
        """A max-pool of words in the place of one of floats."""
        pool = self.abcnets.PackedPool(self.module_of(link), flips, layer.code[1] == "binary")
        name = self.unused(f"{link.name}_of_bits")
        self.fused.add_module(name, pool)
        with self.fused.graph.inserting_after(source):
            return self.fused.graph.call_module(name, (source,))

    def unused(self, name: str) -> str:
        while hasattr(self.fused, name):
            name += "_"
        return name

    def chain_steps(self) -> None:
        """Let layers and pools that only read one another be one module."""
        taken, nodes = set(), list(self.fused.graph.nodes)
        for first in nodes:
            steps = [] if first in taken else self.steps_from(first)
            if steps:
                dims = self.module_of(first).spatial_dims
                before, behind = self.float_steps_before(first, dims), self.float_steps_behind(steps[-1][0], dims == 0)
                taken.update(self.chain(before + steps + behind) or self.chain(steps + behind))
        for pool in nodes:
            dims = 0 if pool in taken else POOLS.get(type(self.module_of(pool)), 0)
            module = self.pool_of(pool, dims) if dims else None
            if module is not None:
                taken.update(self.chain([*self.float_convolution_before(pool, dims), (pool, module)]))

    def chain(self, steps: list) -> list:
        """Let one module be in the place of these (node, module), if there are several and this can be; the nodes."""
        nodes, modules = zip(*steps)
        source = argument(nodes[0])
        if len(steps) < 2 or source is None or not self.memory.is_constant(source):  # until the last step
            return []
        modules = [module for module in modules if type(module) not in IDENTITIES]
        modules[0] = self.in_its_form(modules[0])
        self.insert_chain(f"chain_{nodes[0].name.strip('_')}", modules, nodes[-1], (source,))
        for node in reversed(nodes[:-1]):
            self.fused.graph.erase_node(node)
        return list(nodes)

    def insert_chain(self, name: str, steps: list, last, given: tuple) -> torch.fx.Node:
        """Let a chain of these steps, given these values, be in the place of a node; the node of its call."""
        for layer in filter(self.is_packed, steps):
            layer.folded = True
        name = self.unused(name)
        self.fused.add_module(name, self.abcnets.PackedChain(steps))
        with self.fused.graph.inserting_after(last):
            call = self.fused.graph.call_module(name, given)
        self.put_in_the_place_of(last, call)
        return call

    def in_its_form(self, module) -> nn.Module:
        """The first step of a chain: where it is a convolution of floats, perhaps one in eight bits."""
        if not self.in_eight_bits or type(module) not in CONVOLUTIONS or module.weight.dtype != torch.float32:
            return module
        fits = module.weight.is_cpu and self.abcnets.multiplies_bytes() and module.weight.isfinite().all()
        return self.abcnets.EightBitConv(module) if fits else module

    def fold_sum(self, node) -> None:
        """Let the chain, or layer, that a sum alone reads add what else goes into it, and the ReLU behind follow."""
        if len(node.args) != 2 or node.kwargs or not all(isinstance(value, torch.fx.Node) for value in node.args):
            return
        for mine, other in (node.args, node.args[::-1]):
            chain, source = self.module_of(mine), argument(mine)
            is_known = type(chain) is self.abcnets.PackedChain or self.is_step(chain)
            if not is_known or len(mine.users) > 1 or mine is other or source is None:
                continue
            steps = list(chain.steps) if type(chain) is self.abcnets.PackedChain else [chain]
            puts_out_floats = type(steps[-1]) is self.packed_layer and steps[-1].out_thresholds is None
            writes_to_other = node.target in IN_PLACE and mine is not node.args[0]
            is_constant = self.memory.is_constant(source) and self.memory.is_constant(other)
            if puts_out_floats and steps[-1].spatial_dims and is_constant and not writes_to_other:
                break
        else:
            return
        readers, last = list(node.users), node
        if len(readers) == 1 and type(self.stateless(readers[0])) is nn.ReLU and argument(readers[0]) is node:
            last = readers[0]
        total = self.abcnets.ChainSum(1, relu=last is not node, in_place=node.target in IN_PLACE)
        self.insert_chain(f"sum_{mine.name.strip('_')}", [*steps, total], last, (source, other))
        if last is not node:
            self.fused.graph.erase_node(node)
        self.fused.graph.erase_node(mine)

    def join_chains(self) -> None:
        """Let chains, layers and first convolutions that read one another's floats be one chain."""
        tried = set()
        while True:
            parts = {node: part for node in self.fused.graph.nodes if (part := self.part(node))}
            inner = {node for part in parts.values() for node in part.nodes[:-1]}
            parts = {node: parts[node] for node in parts if node not in inner}
            firsts = [node for node in parts if node not in tried and parts[node].can_begin]
            if not firsts:
                return
            tried.add(firsts[0])
            given, members = self.members_from(firsts[0], parts)
            if len(members) > 1:
                tried.add(self.join(given, members, parts))

    def part(self, node) -> "_Part | None":
        """A chain, a layer, a small first convolution or means of floats, which end at a node and put out floats."""
        module, source = self.module_of(node), argument(node)
        if type(module) is self.abcnets.PackedChain:
            is_joined = any(isinstance(step, self.abcnets.ChainRead) for step in module.steps)
            is_flat = self.is_packed(module.steps[0]) and module.steps[0].spatial_dims == 0
            return None if is_joined or is_flat else _Part(list(module.steps), [node], list(node.args))
        if source is None:
            return self.shrunk_shortcut(node) or self.averages(node)
        if self.is_step(module):
            puts_out_planes = module.spatial_dims > 0 and module.out_thresholds is None
            return _Part([module], [node], [source]) if puts_out_planes else None
        if self.is_small_convolution(module):
            return _Part([module], [node], [source])
        if type(self.stateless(node)) is nn.ReLU and len(source.users) == 1:
            before = self.part(source)
            takes_it = before is not None and type(before.steps[-1]) in (self.packed_layer, *CONVOLUTIONS)
            return _Part([*before.steps, nn.ReLU()], [*before.nodes, node], before.reads) if takes_it else None
        return self.averages(node)

    def members_from(self, first, parts) -> tuple[list, list]:
        """What a chain that begins here is given, at most two values, and all nodes of `parts` that it consists of.

        As many as can be taken in the order in which they are computed, of which only the last one is read by others.
        """
        given, members = list(dict.fromkeys(parts[first].reads)), [first]
        found, inner = (given, members), set(parts[first].nodes)
        for node in list(parts)[list(parts).index(first) + 1 :]:
            new = [value for value in dict.fromkeys(parts[node].reads) if value not in (*members, *given)]
            read = [parts[value] for value in parts[node].reads if value in members]
            if any(type(part.steps[-1]) is nn.Linear for part in read):  # which puts out rows
                continue
            if len(given) + len(new) > 2 or not all(map(self.memory.is_constant, given + new)):
                continue
            given, members, inner = given + new, [*members, node], inner | set(parts[node].nodes)
            if all(member.users.keys() <= inner and self.memory.is_constant(member) for member in members[:-1]):
                found = given, members
        return found

    def join(self, given, members, parts) -> torch.fx.Node:
        """Let one chain, the node returned, be in the place of these.

        given: values 0 and 1, of which the first node reads the former.
        """
        values, steps = dict(zip(given, range(2))), []
        for i, node in enumerate(members):
            source, *other = parts[node].reads
            if i:
                values[members[i - 1]] = i + 1
                steps.append(self.abcnets.ChainRead(values[source]))
            for step in parts[node].steps:
                if isinstance(step, self.abcnets.ChainSum):
                    step = self.abcnets.ChainSum(values[other[0]], step.relu, step.in_place)
                steps.append(step)
        steps[0], last = self.in_its_form(steps[0]), members[-1]
        name = f"chain_{members[0].name.removeprefix('chain_').strip('_')}_to_{last.name.strip('_')}"
        call = self.insert_chain(name, steps, last, tuple(given))
        for node in reversed([node for member in members for node in parts[member].nodes if node is not last]):
            self.fused.graph.erase_node(node)
        return call

    def shrunk_shortcut(self, node) -> "_Part | None":
        """Average pooling of images, and channels of zeros behind those that there are."""
        is_usual = node.kwargs in ({}, {"mode": "constant", "value": None})
        if node.op != "call_function" or node.target is not F.pad or len(node.args) != 2 or not is_usual:
            return None
        pool, padding = node.args
        if not isinstance(pool, torch.fx.Node) or len(pool.users) > 1 or not isinstance(padding, (tuple, list)):
            return None
        if len(padding) != 6 or any(padding[:5]) or not isinstance(padding[5], int) or padding[5] < 0:
            return None
        kernel = self.average_pool_of(pool)
        if kernel is None or not self.memory.is_constant(pool):
            return None
        return _Part([self.abcnets.ChainAverage(padding[-1], kernel)], [pool, node], [pool.args[0]], False)

    def average_pool_of(self, node) -> list | None:
        """The sizes of average pooling's windows, where these lie side by side in two dimensions."""
        module, options = self.module_of(node), ()
        if type(module) is nn.AvgPool2d and self.is_plain(module) and argument(node) is not None:
            is_known = not module.ceil_mode and module.padding in (0, (0, 0)) and module.divisor_override is None
            options = (module.kernel_size, module.stride) if is_known else ()
        elif node.op == "call_function" and node.target is F.avg_pool2d and not node.kwargs:
            source, *options = node.args
            is_known = 1 <= len(options) <= 2 and isinstance(source, torch.fx.Node)
            options = [options[0], options[-1] or options[0]] if is_known else ()
        if not all(isinstance(size, (int, tuple, list)) for size in options):
            return None
        sizes = [[size, size] if isinstance(size, int) else list(size) for size in options]
        is_known = sizes and sizes[0] == sizes[1] and [type(size) for size in sizes[0]] == [int, int]
        return sizes[0] if is_known else None

    def averages(self, node) -> "_Part | None":
        """An average over whole images, perhaps behind BatchNorm and ReLU and in front of a small linear layer."""
        nodes, behind, link = [], [], node
        if type(self.module_of(node)) is nn.Linear:
            linear, flatten = self.module_of(node), argument(node)
            if flatten is None or not self.is_own(linear) or not _is_small(linear):
                return None
            link = flatten.args[0] if flatten.args else None
            is_flatten = type(self.stateless(flatten)) is nn.Flatten and len(flatten.users) == 1
            if not is_flatten or not isinstance(link, torch.fx.Node) or len(link.users) > 1:
                return None
            nodes, behind = [flatten, node], [self.stateless(flatten), linear]
        pool = self.module_of(link)
        if type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1)) or not self.is_plain(pool):
            return None
        source, scales, relu, nodes = argument(link), (None, None), False, [link, *nodes]
        if source is not None and type(self.stateless(source)) is nn.ReLU and len(source.users) == 1:
            nodes, relu, source = [source, *nodes], True, argument(source)
            norm = None if source is None else self.module_of(source)
            if type(norm) is nn.BatchNorm2d and len(source.users) == 1:
                statistics = self.statistics(source, 2, norm.num_features)
                scales = _scales_of(norm, *statistics) if statistics else scales
                if scales[0] is not None:
                    nodes, source = [source, *nodes], argument(source)
        if source is None or not all(map(self.memory.is_constant, [source, *nodes[:-1]])):
            return None
        return _Part([self.abcnets.ChainAverage(0, None, *scales, relu), *behind], nodes, [source], False)

    def put_in_the_place_of(self, node, other) -> None:
        """Let all readers of a node read another one."""
        node.replace_all_uses_with(other)
        self.memory.rename(node, other)
        self.fused.graph.erase_node(node)

    # Steps: lists of (node, module).

    def steps_from(self, node) -> list:
        """A chain that begins here: a layer, those that alone read one another, perhaps a float pool."""
        steps, layer = [], self.module_of(node)
        while self.is_step(layer):
            steps.append((node, layer))
            readers = list(node.users)
            if layer.out_thresholds is None:  # floats come out
                is_read = len(readers) == 1 and argument(readers[0]) is node
                pool = self.pool_of(readers[0], layer.spatial_dims) if is_read else None
                return steps if pool is None else [*steps, (readers[0], pool)]
            (node,) = readers
            while type(self.module_of(node)) is self.abcnets.PackedPool:
                steps.append((node, self.module_of(node)))
                (node,) = node.users
            layer = self.module_of(node)
        return []

    def float_steps_before(self, node, dims: int) -> list:
        """A small stock convolution, and perhaps its max-pool, that feed a chain alone."""
        link = argument(node)
        pool = None if link is None or len(link.users) > 1 else self.pool_of(link, dims)
        if pool is None:
            return self.float_convolution_before(node, dims)
        convolution = self.float_convolution_before(link, dims)
        return [*convolution, (link, pool)] if convolution else []

    def float_convolution_before(self, node, dims: int) -> list:
        """A small stock convolution, and in front of a pool ReLUs, that feed a node alone."""
        link, relus, is_pool = argument(node), [], self.pool_of(node, dims) is not None
        while link is not None and len(link.users) == 1:
            stock, relu = self.module_of(link), self.stateless(link)
            if CONVOLUTIONS.get(type(stock)) == dims:
                return [(link, stock), *relus] if self.is_small_convolution(stock) else []
            if not is_pool or type(relu) not in (nn.ReLU, *IDENTITIES):
                return []
            link, relus = argument(link), [(link, relu), *relus]
        return []

    def is_small_convolution(self, module) -> bool:
        if type(module) not in CONVOLUTIONS or not self.is_own(module):
            return False
        is_small = module.in_channels <= FEW_CHANNELS and _is_small(module)
        return is_small and module.groups == 1 and module.padding_mode == "zeros"

    def float_steps_behind(self, node, is_flat: bool) -> list:
        """ReLUs, flattening and a small stock linear layer that a chain alone feeds, if all are there."""
        steps = []
        while len(node.users) == 1:
            before, (node,) = node, node.users
            module, stateless = self.module_of(node), self.stateless(node)
            if type(module) is nn.Linear:
                is_fed = is_flat and self.is_own(module) and argument(node) is before
                return [*steps, (node, module)] if is_fed and _is_small(module) else []
            if stateless is None:
                return []
            steps.append((node, stateless))
            is_flat |= type(stateless) is nn.Flatten
        return []

    def stateless(self, node) -> nn.Module | None:
        """A module that does what a node does, where that is ReLU, flattening or nothing."""
        module = self.module_of(node)
        if module is not None:
            is_flatten = type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
            is_known = is_flatten or type(module) in (nn.ReLU, *IDENTITIES)
            return module if is_known and self.is_plain(module) else None
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in RELUS and argument(node) is not None:
            return nn.ReLU()
        is_flatten = node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs
        return nn.Flatten() if is_flatten else None

    def is_step(self, layer) -> bool:
        is_known = type(layer) is self.packed_layer and layer.activation_bases is not None and self.is_own(layer)
        return is_known and layer.runs_bits() and layer.padding_mode == "zeros"


@dataclass
class _Part:
    """What a chain may consist of: its steps, the nodes that they are in the place of, and what these read."""

    steps: list
    nodes: list
    reads: list  # the source, and what is added
    can_begin: bool = True  # whether a chain may begin with them


def _scales_of(norm, mean, var, weight, bias) -> tuple:
    """(scale, shift) of a BatchNorm, or (None, None) where they are not finite."""
    scale = (var + norm.eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return (scale, shift) if (scale.isfinite() & shift.isfinite()).all() else (None, None)


def _check_model(model: nn.Module, layers: list) -> None:
    if not layers:
        raise ValueError("fuse takes what pack or load_packed of this abcnets returned; this model has no packed layer")
    if any(layer.fused for layer in layers):
        raise ValueError("fuse takes what pack or load_packed returned; this model is fused already")
    for layer in layers:
        if layer.alphas.dtype != torch.float32 or layer.alphas.is_meta:
            raise ValueError(f"fuse computes with numbers in float32, but those of a layer are {layer.alphas.dtype} on "
                             f"{layer.alphas.device}")  # fmt: skip
    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        raise ValueError("fuse can't keep hooks that are registered for all modules")
    if is_watched(model):
        raise ValueError("fuse would lose the hooks or the forward method that this model itself was given: give them "
                         "to the fused model")  # fmt: skip


def _is_small(layer: nn.Module) -> bool:
    """Whether a layer of floats is worth a step of a chain."""
    return layer.weight.numel() <= FEW_WEIGHTS and layer.weight.dtype == torch.float32


_SUMS = (operator.add, operator.iadd, torch.add)
FEW_CHANNELS, FEW_WEIGHTS = 4, 1 << 14  # of a float layer in a chain: images have few, and others gain nothing there


def fold(functions: list, layer) -> tuple[Tensor, Tensor] | None:
    """Thresholds (T, C) and flips (C,) on z with (z >= thresholds) != flips where f(z) >= the layer's own thresholds.

    f, the composition, is monotone in each channel, so each threshold is the smallest float32 for which a comparison
    comes true (or, in a falling channel, ceases to be true). Floats are ordered like their bits, which makes bisection
    32 evaluations. Max-pools are entries None: they commute. Returns None where f puts out NaN for numbers.
    """
    T, C = len(layer.thresholds), layer.channels
    wanted = layer.thresholds[:, None]

    def f(z):
        for function in functions:
            z = z if function is None else function(z)
        return z

    extreme = torch.finfo(torch.float32).max
    low, middle, high = (f(wanted.new_full((1, C), value))[0] for value in (-extreme, 0, extreme))
    if (low.isnan() | middle.isnan() | high.isnan()).any():
        return None
    flips = high < low

    def passed(key):  # monotone in the key: False, then True
        return (f(_float_of_key(key)) >= wanted) != flips

    infinity = _key_of_float(wanted.new_tensor(math.inf))
    below = wanted.new_zeros((T, C), dtype=torch.int64) - infinity - 1  # one step below -inf: never passed
    above = torch.zeros_like(below) + infinity  # if nothing smaller passes, +inf is the threshold
    below_all = passed(-infinity.expand(T, C))
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

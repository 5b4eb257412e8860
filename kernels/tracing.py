"""A packed model as a graph of torch.fx, and what may be said of its values: how they are used, where they lie.

A trace is only that model where no value changes behind its back. What cannot be followed is refused: a forward pass
that changes the model's own tensors, two names for a tensor of which one was changed in place. `Memory` knows of the
rest which values share memory, and which are written to after they were made.
"""

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def trace(abcnets, model: nn.Module) -> torch.fx.GraphModule:
    """The graph of a model whose forward pass leaves its own tensors as they are. Raises: ValueError for others."""
    own = _own_tensors(model)
    try:
        constants = _constants(model)
        graph = _tracer(abcnets).trace(model, constants)
        _require_constants(abcnets, graph, constants)
    except Exception as error:
        raise ValueError(f"fuse traces the model with torch.fx, which failed: {error}") from error
    if own != _own_tensors(model):
        raise ValueError("fuse needs a model whose forward pass leaves its own tensors as they are")
    _check_in_place(graph)
    return torch.fx.GraphModule(model, graph)


class Memory:
    """Which values of a traced model share memory, and which lie in memory that is written to after they were made.

    Work in place does no harm where nobody else can see it: over a fresh result that has one reader. What comes out
    is then as good as fresh. All that is not known here is taken to hand on the memory of whatever it is given; and
    what is neither torch's nor Python's, to write to it.
    """

    def __init__(self, graph: torch.fx.Graph, module_of, packed_layer: type):
        self._module_of, self._packed_layer = module_of, packed_layer
        self._fresh = set()  # values in memory of their own
        self._owned = set()  # values whose memory only their one reader can reach
        group = {}  # value -> all that may share its memory
        self._written, arguments = set(), []  # of forward, which may be one tensor
        for node in graph.nodes:
            group[node] = {node}
            source = self._source_of(node)
            if node.op == "placeholder":
                arguments.append(node)
            if self._is_fresh(node) or (self._works_in_place(node) and source in self._owned):
                self._fresh.add(node)
            else:
                for other in arguments if node.op == "placeholder" else node.all_input_nodes:
                    group[node] |= group[other]
                for value in group[node]:
                    group[value] = group[node]
                if self._works_in_place(node) or self._may_write(node):
                    self._written |= group[node] - {node}
            is_same = type(self._module_of(node)) in IDENTITIES and source in self._owned
            if len(node.users) == 1 and (node in self._fresh or is_same):
                self._owned.add(node)

    def is_constant(self, node) -> bool:
        """Whether a value stays, for as long as it is there, what it was when it was made."""
        return node not in self._written

    def rename(self, node, other) -> None:
        """Another node puts out what this one did."""
        if node in self._written:
            self._written.add(other)

    def writes_to(self, node) -> list:
        """The values that a node may write to, as it is given them."""
        if self._works_in_place(node):
            return [source for source in [self._source_of(node)] if source is not None] or node.all_input_nodes
        return node.all_input_nodes if self._may_write(node) else []

    @staticmethod
    def _source_of(node) -> torch.fx.Node | None:
        """What a node passes on or writes over."""
        return node.args[0] if node.target in IN_PLACE else argument(node)

    def _works_in_place(self, node) -> bool:
        """Whether a node writes its result over what it is given first, and nothing else."""
        if node.op == "call_module":
            module = self._module_of(node)
            return type(module) in MONOTONE_MODULES and getattr(module, "inplace", False) and not is_watched(module)
        if node.op in ("call_function", "call_method") and node.target in RELUS:
            return node.target in (torch.relu_, "relu_") or _is_asked(node, "inplace")
        return node.op == "call_function" and node.target in IN_PLACE

    def _is_fresh(self, node) -> bool:
        if self._works_in_place(node) or self._may_write(node):
            return False
        if node.op == "call_module":
            kinds = (self._packed_layer, nn.Linear, *CONVOLUTIONS, *BATCH_NORMS, *POOLS, *MONOTONE_MODULES)
            return type(self._module_of(node)) in kinds and type(self._module_of(node)) not in IDENTITIES
        if node.op not in ("call_function", "call_method"):
            return False
        # A sum of tensors is a new one; of tuples it holds the same tensors.
        known = any(source in self._fresh for source in node.all_input_nodes)
        return node.target in RELUS or (known and node.target in _ARITHMETIC)

    def _may_write(self, node) -> bool:
        """Whether anything that a node is given may be another thing afterwards."""
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        if node.op == "call_module":
            module = self._module_of(node)
            return is_watched(module) or getattr(module, "inplace", False) or next(module.children(), None) is not None
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.is_mutable
        if node.op == "call_function":
            origin = str(getattr(node.target, "__module__", None)).partition(".")[0]
            if origin not in ("torch", "_operator", "math", "builtins"):
                return True
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        writes = name.endswith("_") and (not name.endswith("__") or name.strip("_") in torch.fx.graph.inplace_methods)
        return writes or name == "setitem" or _is_asked(node, "inplace") or node.kwargs.get("out") is not None


def argument(node) -> torch.fx.Node | None:
    """The one value that a node is given, where that (and whether to work in place) is all it is given."""
    options = [*node.args[1:], *node.kwargs.values()]
    if not node.args or not isinstance(node.args[0], torch.fx.Node) or node.kwargs.keys() - {"inplace"}:
        return None
    return node.args[0] if all(isinstance(option, bool) for option in options) else None


def is_watched(module: nn.Module) -> bool:
    """Whether somebody has hooks on a module, or gave it another forward method than its class's."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_asked(node, option: str) -> bool:
    """Whether a function of torch.nn.functional is given an option, by name or by place."""
    given = dict(node.kwargs)
    if node.op == "call_function" and hasattr(node.target, "__code__"):
        code = node.target.__code__
        given |= zip(code.co_varnames[: code.co_argcount], node.args)
    return given.get(option, False) is not False


def is_of_attribute(node) -> bool:
    """Whether a value is a tensor of the model itself, or what a method or an index of that makes: perhaps a view."""
    while node.op == "call_method" or node.target in (operator.getitem, getattr):
        if not isinstance(node.args[0], torch.fx.Node):
            return False
        node = node.args[0]
    return node.op == "get_attr"


def _check_in_place(graph) -> None:
    """x += y changes a tensor for all who hold it, but makes a new number: which of both it is, no trace says.

    Only where x is what a module put out it is known to be a tensor. Elsewhere the old x must not be used any more.
    """
    changed = {}
    for node in graph.nodes:
        for value in changed.keys() & set(node.all_input_nodes):
            raise ValueError(f"fuse can't tell what {node.name} gets: another name for {value.name}, which "
                             f"{changed[value].name} has changed by += or its kin. Write x = x + y there")  # fmt: skip
        if node.op == "call_function" and node.target in IN_PLACE and node.args[0].op != "call_module":
            changed[node.args[0]] = node


def _own_tensors(model: nn.Module) -> dict:
    """What can be told of the model's tensors without reading them: which they are, and how often they were changed."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), None if t.is_inference() else t._version) for name, t in tensors.items()}


def _constants(model: nn.Module) -> dict:
    """Arguments of forward whose default says that there is none, or answers yes or no: the trace holds for these."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, bool)}


def _require_constants(abcnets, graph, constants: dict) -> None:
    """Let the fused model refuse another value; torch.fx renames such an argument, and asserts, which -O takes out."""
    for node in list(graph.find_nodes(op="placeholder")):
        name = node.target.rpartition("_")[0]
        if name not in constants or node.target in constants:
            continue
        for check in list(node.users):  # an assertion, or a comparison that one reads
            for assertion in list(check.users):
                graph.erase_node(assertion)
            graph.erase_node(check)
        node.target = name
        with graph.inserting_after(node):
            graph.call_function(abcnets.fused_for, (name, node, constants[name]))


def _tracer(abcnets) -> torch.fx.Tracer:
    whole = (abcnets.PackedLayer, abcnets.ABCConv1d, abcnets.ABCConv2d, abcnets.ABCConv3d, abcnets.ABCLinear)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, whole) or super().is_leaf_module(module, name)

        def proxy(self, node):
            return _Proxy(node, self)

    return Tracer()


class _Proxy(torch.fx.Proxy):
    """torch.fx's, for which x += y is not x = x + y: whoever else holds x would not see it.

    And which has the attributes of a tensor and no others, none of which can be set.
    """

    def __getattr__(self, name):
        if not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no attribute {name!r}")
        return _Attribute(self, name)

    def __setattr__(self, name, value):
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise AttributeError(f"fuse can't follow the setting of a tensor's attribute {name!r}")
        super().__setattr__(name, value)


class _Attribute(torch.fx.proxy.Attribute, _Proxy):
    """x.data and its like."""


def _stays_in_place(function):
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


IN_PLACE = [getattr(operator, name) for name in torch.fx.graph.inplace_methods if name != "setitem"]
for _function in IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _stays_in_place(_function))

# Non-decreasing, elementwise. BatchNorm is monotone in each channel, in either direction.
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
MONOTONE_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Tanh, *IDENTITIES)
BATCH_NORMS = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}  # over channels of which layers
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul)
POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}


"""Tensors that stay on the device between calls, whatever streams make and read them.

torch's allocator knows of a tensor the stream that made it, and that is all the order there is. So a tensor that is
kept is finished before anybody sees it, and the allocator is told of every other stream that reads it.
"""

import threading
import weakref

import torch

from .primitives import SIMULATED


class Kept:
    """The tensors that were made beside a layer's own, until they are dropped."""

    def __init__(self):
        self._tensors, self._streams, self._lock = weakref.WeakValueDictionary(), set(), threading.Lock()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, finished: the stream that makes it, the current one, is waited for, once."""
        refuse_while_capturing()
        stream = current_stream()
        if stream is not None:
            stream.synchronize()
        with self._lock:
            self._tensors[id(tensor)] = tensor
            for stream in self._streams:
                tensor.record_stream(stream)
        return tensor

    def read(self) -> None:
        """To be called by whoever reads: a tensor's memory, once it is dropped, waits for the current stream too."""
        stream = current_stream()
        if stream is not None and stream not in self._streams:
            with self._lock:
                for tensor in list(self._tensors.values()):
                    tensor.record_stream(stream)
                self._streams.add(stream)


def current_stream():
    return None if SIMULATED else torch.cuda.current_stream()


def capturing() -> bool:
    return not SIMULATED and torch.cuda.is_current_stream_capturing()


def refuse_while_capturing() -> None:
    """What is made in a CUDA graph is empty until it runs, and its memory is the graph's."""
    if capturing():
        raise RuntimeError("call a packed layer once with an input of this shape before a CUDA graph captures it")


def hold_for_graph(tensor: torch.Tensor, *values) -> None:
    """Let the values, which a CUDA graph reads at each replay, live as long as the tensor, however it changes."""
    weakref.finalize(tensor, _let_go, *values)


def _let_go(*values) -> None:
    pass

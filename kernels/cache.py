"""What the engines make once and keep: beside a layer's tensors (`Beside`), or by size (`Recent`). Both are bounded.

Neither has a lock: each step is one operation on a dictionary. So threads may look things up at the same time; two
that miss at once both make the value, and the later one stays. And a tensor may die in the middle of any of this
(whenever Python collects garbage) without a thread waiting for itself.
"""

import functools
import itertools
import weakref

_clock = itertools.count()  # says what was used last


class Recent:
    """At most `limit` values by key: a new one replaces the one that has not been asked for the longest."""

    def __init__(self, limit: int):
        self._limit, self._entries = limit, {}  # key -> [when last used, value]

    def get(self, key, make, *arguments):
        """What is kept under the key; make(*arguments), and kept from now on, if there is nothing."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = [next(_clock), make(*arguments)]
            _drop_oldest(self._entries, self._limit)
        entry[0] = next(_clock)
        return entry[1]

    def __len__(self):
        return len(self._entries)


class Beside:
    """make(tensors, *key), kept for as long as the tensors live and nobody replaces one or changes one in place.

    The tensors (each but the first may be None) are held weakly, so what `make` returns must not hold them either; at
    most `limit` values are kept beside one first tensor. Tensors made in inference mode do not count their changes, and
    no tensor counts those through `.data` or NumPy: `PackedLayer.refresh` is for these.
    """

    def __init__(self, make, limit: int):
        self._make, self._limit, self._entries = make, limit, {}

    def get(self, tensors, *key):
        name = (*map(id, tensors), *key)  # ids are safe: an entry is gone before the id of its tensor is free again
        entry = self._entries.get(name)
        if entry is not None:
            for tensor, version in zip(tensors, entry[2]):
                if version is not None and tensor._version != version:
                    break
            else:
                entry[0] = next(_clock)
                return entry[1]
        # Read before the tensors are: what is made while one changes is never taken for what it changed to.
        versions = [None if t is None or t.is_inference() else t._version for t in tensors]
        value = self._make(tensors, *key)
        forget = functools.partial(_forget, self._entries, name)
        references = [weakref.ref(t, forget) for t in tensors if t is not None]
        self._entries[name] = [next(_clock), value, versions, references]
        _drop_oldest(self._entries, self._limit, name[0])
        return value

    def __len__(self):
        return len(self._entries)


def _forget(entries, name, _) -> None:
    """A tensor died."""
    entries.pop(name, None)


def _drop_oldest(entries, limit, first=None) -> None:
    """Leave `limit` entries, or that many of those whose key begins with `first`."""
    used = {key: entry[0] for key, entry in entries.copy().items() if first is None or key[0] == first}
    for key in sorted(used, key=used.get)[: max(0, len(used) - limit)]:
        entries.pop(key, None)

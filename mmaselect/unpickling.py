"""What ``torch.load`` with ``weights_only=True`` may make besides tensors and plain values."""

from __future__ import annotations

import codecs
import pickle
from _compat_pickle import IMPORT_MAPPING  # from names of Python 2, which torch writes
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

#: Before torch 2.6: by the name that a pickle has for it. These torch has of its own since; the first makes bytes of
#: numpy's scalars, the second holds milestones of a schedule.
_ADMITTED: dict[str, Any] = {
    '_codecs.encode': codecs.encode,
    'collections.Counter': Counter,
    **{f'builtins.{one.__name__}': one for one in (bytearray, complex, set)},
}
#: The unpickler whose steps can be checked.
_Python: Any = pickle._Unpickler


def _known() -> dict[str, Any]:
    return {**torch._weights_only_unpickler._get_allowed_globals(), **_ADMITTED}


class _Unpickler(_Python):
    """Makes what torch's own one makes, and what was admitted."""

    dispatch = dict(_Python.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        known, module = _known(), IMPORT_MAPPING.get(module, module)
        if f'{module}.{name}' not in known:
            raise pickle.UnpicklingError(f'Weights only load failed: Unsupported global: GLOBAL {module}.{name}')
        return known[f'{module}.{name}']

    def load_build(self) -> None:
        """Fills an object of a known class; not a class or a function, of which there is one for all."""
        if not any(type(self.stack[-2]) is known for known in _known().values()):
            raise pickle.UnpicklingError(f'Weights only load failed: it would change a {type(self.stack[-2]).__name__}')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class _Module:
    """What ``torch.load`` calls of a pickle module."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, *, encoding: str = 'ASCII') -> Any:
        return _Unpickler(file, encoding=encoding).load()


def admit(entries: Sequence[tuple[Any, str]]) -> None:
    """Admits classes and functions, for all of the process.

    Before torch 2.6 there is no list that could hold functions under other names. There torch's restricted unpickler
    is replaced by one with the same rules and a list.

    Args:
        entries: What is made or called, and the name that a pickle has for it.
    """
    if torch.__version__ >= '2.6':
        torch.serialization.add_safe_globals(list(entries))
    else:
        _ADMITTED.update((name, value) for value, name in entries)
        torch.serialization._weights_only_unpickler = _Module  # type: ignore[assignment]

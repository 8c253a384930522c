"""What a config's entries name, by strings or by classes (mmengine's pure-Python configs), and whose config it is."""

from __future__ import annotations

from typing import Any

#: Toolboxes whose data sets, collating and hooks differ.
SCOPES = ('mmpretrain', 'mmseg', 'mmdet')


def type_name(entry: Any) -> str:
    """Name of the class that a config entry names, without its package."""
    kind = (entry or {}).get('type')
    return kind.__name__ if isinstance(kind, type) else str(kind).split('.')[-1]


def scope_of(cfg: Any) -> str | None:
    """The toolbox that a config is written for: its ``default_scope``, or else that of the model's class."""
    if cfg.get('default_scope'):
        return cfg.get('default_scope')
    kind = (cfg.get('model') or {}).get('type')
    modules = [base.__module__ for base in kind.__mro__] if isinstance(kind, type) else [str(kind)]
    return next((name for name in (module.split('.')[0] for module in modules) if name in SCOPES), None)

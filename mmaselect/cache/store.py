"""Tensors under keys, in safetensors shards that appear whole, are named by their checksum and read memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmaselect.errors import InputError
from mmaselect.files import atomic_path, remove_abandoned

logger = logging.getLogger('mmaselect')

#: A shard is written when its rows have this many bytes.
SHARD_BYTES = 64 << 20
_SUFFIX = '.safetensors'


class FeatureStore:
    """Rows of equally shaped tensors, each under a key.

    A shard is a safetensors file whose name is the SHA-256 of its bytes and whose header names the keys of its rows.
    Any number of processes may write to one folder: what two of them write at once is there twice and read once.

    Args:
        folder: Is created.

    Raises:
        InputError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder)
        except OSError as error:
            raise InputError(f'{self.folder} cannot be used as a cache: {error.strerror or error}') from error
        self._rows: dict[str, tuple[str, int]] = {}
        self._known: set[str] = set()
        self._maps: dict[str, dict[str, Tensor]] = {}

    def shards(self) -> list[str]:
        """Names of the shards in the folder, sorted."""
        return sorted(path.stem for path in self.folder.glob(f'[0-9a-f]*{_SUFFIX}'))

    def verify(self, shards: Sequence[str], threads: int = 4) -> list[str]:
        """Compares shards with their checksums, and removes those that are not what they say.

        Args:
            shards: Of :meth:`shards`.
            threads: How many are read at once.

        Returns:
            What was removed.
        """

        def is_sound(name: str) -> bool:
            try:
                return hashlib.sha256(self._path(name).read_bytes()).hexdigest() == name
            except FileNotFoundError:  # removed by another process, which found the same
                return True

        with ThreadPoolExecutor(threads) as pool:
            bad = [name for name, sound in zip(shards, pool.map(is_sound, shards)) if not sound]
        for name in bad:
            logger.warning(
                '%s does not have the checksum in its name: it is removed and computed again', self._path(name)
            )
            self._path(name).unlink(missing_ok=True)
        return bad

    def refresh(self) -> None:
        """Reads the keys of shards that are new, and forgets those of shards that are gone."""
        present = set(self.shards())
        for name in self._known - present:
            self._rows = {key: place for key, place in self._rows.items() if place[0] != name}
            self._maps.pop(name, None)
        for name in sorted(present - self._known):
            for row, key in enumerate(self._keys(name)):
                self._rows.setdefault(key, (name, row))
        self._known = present

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, rows: dict[str, dict[str, Tensor]]) -> Path:
        """Writes a shard.

        Args:
            rows: Tensors by name, by key; of one name all have the same shape and dtype.

        Returns:
            The file.

        Raises:
            InputError: If shapes differ, or the file cannot be written.
        """
        from safetensors.torch import save

        names = list(next(iter(rows.values())))
        tensors = {}
        for name in names:
            values = [row[name] for row in rows.values()]
            shapes = {(tuple(value.shape), value.dtype) for value in values}
            if len(shapes) > 1:
                found = ' and '.join(str(shape) for shape, _ in sorted(shapes, key=str)[:2])
                raise InputError(f'{name} of {found} cannot be cached together: the pipeline must give one size')
            tensors[name] = torch.stack(values)
        content = save(tensors, {'rows': json.dumps(list(rows))})
        path = self._path(hashlib.sha256(content).hexdigest())
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise InputError(f'{path} cannot be written: {error.strerror or error}') from error
        return path

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Reads rows.

        Args:
            keys: Of rows that are in the store.

        Returns:
            Tensors by name, (rows, ...), copied out of the mapped files.
        """
        places: dict[str, tuple[list[int], list[int]]] = {}
        for position, key in enumerate(keys):
            name, row = self._rows[key]
            positions, rows = places.setdefault(name, ([], []))
            positions.append(position)
            rows.append(row)
        count = sum(len(positions) for positions, _ in places.values())
        read: dict[str, Tensor] = {}
        for name, (positions, rows) in places.items():
            if name not in self._maps:
                self._maps[name] = self._map(name)
            for field, tensor in self._maps[name].items():
                found = tensor.index_select(0, torch.tensor(rows))
                if len(places) == 1:
                    read[field] = found
                    continue
                out = read.setdefault(field, tensor.new_empty(count, *tensor.shape[1:]))
                out[positions] = found
        return read

    def require(self, num_bytes: int, limit: float | None) -> None:
        """Refuses to begin what cannot be finished.

        Args:
            num_bytes: That will be written.
            limit: In GB (1e9 bytes), or None.

        Raises:
            InputError: If that is more than the limit, or than the disk has free.
        """
        size = num_bytes / 1e9
        advice = 'take fewer views, a smaller dtype, or smaller images'
        if limit is not None and size > limit:
            raise InputError(f'max_gb={limit:g} is less than the {size:.3g} GB that the features would take: {advice}')
        free = shutil.disk_usage(self.folder).free / 1e9
        if size > free:
            raise InputError(
                f'{self.folder} has {free:.3g} GB free, but the features would take {size:.3g} GB: {advice}'
            )

    def _path(self, name: str) -> Path:
        return self.folder / f'{name}{_SUFFIX}'

    def _open(self, name: str) -> safe_open:
        return safe_open(str(self._path(name)), framework='pt')

    def _keys(self, name: str) -> list[str]:
        # Verified by now: what cannot be read is another program's file.
        try:
            return json.loads(self._open(name).metadata()['rows'])
        except Exception as error:
            raise InputError(f'{self._path(name)} is not a shard of features: {error}') from error

    def _map(self, name: str) -> dict[str, Tensor]:
        file = self._open(name)
        return {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118

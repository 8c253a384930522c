"""Tensors under keys, in safetensors shards that appear whole, are named by their checksum and read memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from mmaselect.errors import InputError
from mmaselect.files import atomic_path, remove_abandoned, write_json

logger = logging.getLogger('mmaselect')

#: A shard is written when its rows have this many bytes.
SHARD_BYTES = 64 << 20
#: Shards that are mapped at once: Linux allows a process 65,530 mappings, all libraries included.
MAPPED = 16384
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
        # The keys of all rows, shard by shard, and how to sort them: 40 bytes a row.
        self._names: list[str] = []
        self._starts, self._keys, self._order = np.zeros(1, int), np.empty(0, 'S1'), np.empty(0, int)
        self._maps: dict[str, dict[str, tuple[Tensor, np.ndarray]]] = {}

    def shards(self) -> list[str]:
        """Names of the shards in the folder, sorted."""
        return sorted(path.stem for path in self.folder.glob(f'[0-9a-f]*{_SUFFIX}'))

    def verify(self, shards: Sequence[str], threads: int = 4, since: int = 0) -> list[str]:
        """Compares shards with their checksums, and removes those that are not what they say.

        Args:
            shards: Of :meth:`shards`.
            threads: How many are read at once.
            since: Those that have not changed since then are believed, see :meth:`verified_until`.

        Returns:
            What was removed.
        """
        shards = [name for name in shards if self._changed(name) >= since]

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

    def clock(self) -> int:
        """Now, in nanoseconds, by the clock that stamps the files of the folder."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_ctime_ns

    def verified_until(self) -> int:
        """When all shards were last verified, or 0: what has not changed since then, by its inode, is what it was."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self._record.read_text())['verified_until'])
        return 0

    def set_verified(self, moment: int) -> None:
        """Notes that all shards have been verified.

        Args:
            moment: Of :meth:`clock`, before the first was.
        """
        write_json(self._record, {'verified_until': moment})

    def refresh(self) -> None:
        """Reads the keys of shards that are new, and forgets those of shards that are gone."""
        known = dict(zip(self._names, np.split(self._keys, self._starts[1:-1])))
        present = self.shards()
        if present == self._names:
            return
        found = [known[name] if name in known else self._read_keys(name) for name in present]
        self._names, self._maps = present, {name: self._maps[name] for name in present if name in self._maps}
        self._starts = np.cumsum([0, *map(len, found)])
        self._keys = np.concatenate([np.empty(0, 'S1'), *found])
        # Of a key that two shards have, the first counts.
        self._order = np.argsort(self._keys, kind='stable')

    def find(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Finds rows.

        Args:
            keys: Of rows.

        Returns:
            A number of each row; -1 for what is not there.
        """
        wanted = np.asarray(keys, dtype='S')
        if not len(self._keys):
            return np.full(wanted.shape, -1)
        # In the width of what is searched, which would be copied otherwise.
        places = np.searchsorted(self._keys, wanted.astype(self._keys.dtype), sorter=self._order)
        rows = self._order[np.minimum(places, len(self._keys) - 1)]
        return np.where(self._keys[rows] == wanted, rows, -1)

    def __contains__(self, key: str) -> bool:
        return bool(self.find([key])[0] >= 0)

    def __len__(self) -> int:
        return len(np.unique(self._keys))

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

    def read(self, keys: Sequence[str] | np.ndarray) -> dict[str, Tensor]:
        """Reads rows.

        Args:
            keys: Of rows that are in the store.

        Returns:
            Tensors by name, (rows, ...), copied out of the mapped files.

        Raises:
            KeyError: If one is not.
        """
        places = self.find(keys)
        if (places < 0).any():
            raise KeyError(f'{self.folder} does not have all of these rows')
        shards = np.searchsorted(self._starts, places, 'right') - 1
        read: dict[str, Tensor] = {}
        raw: dict[str, np.ndarray] = {}
        for position, (shard, row) in enumerate(zip(shards.tolist(), (places - self._starts[shards]).tolist())):
            for field, (tensor, content) in self._map(self._names[shard]).items():
                if field not in read:
                    read[field] = tensor.new_empty(len(places), *tensor.shape[1:])
                    raw[field] = _bytes_of(read[field])
                raw[field][position] = content[row]
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

    @property
    def _record(self) -> Path:
        return self.folder / 'verified.json'

    def _changed(self, name: str) -> int:
        try:
            found = self._path(name).stat()
        except FileNotFoundError:  # removed by another process
            return 0
        return max(found.st_mtime_ns, found.st_ctime_ns)

    def _path(self, name: str) -> Path:
        return self.folder / f'{name}{_SUFFIX}'

    def _open(self, name: str) -> safe_open:
        return safe_open(str(self._path(name)), framework='pt')

    def _read_keys(self, name: str) -> np.ndarray:
        # Verified by now: what cannot be read is another program's file.
        try:
            return np.array(json.loads(self._open(name).metadata()['rows']), dtype='S')
        except Exception as error:
            raise InputError(f'{self._path(name)} is not a shard of features: {error}') from error

    def _map(self, name: str) -> dict[str, tuple[Tensor, np.ndarray]]:
        if name not in self._maps:
            if len(self._maps) >= MAPPED:
                self._maps.pop(next(iter(self._maps)))
            file = self._open(name)
            tensors = {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118
            self._maps[name] = {field: (tensor, _bytes_of(tensor)) for field, tensor in tensors.items()}
        return self._maps[name]


def _bytes_of(rows: Tensor) -> np.ndarray:
    """The memory of rows, (rows, bytes): numpy copies a row of a mapped file in a fraction of torch's time."""
    return rows.reshape(len(rows), -1).view(torch.uint8).numpy()

"""Files are read again once they are changed, replaced or moved, and not before."""

from __future__ import annotations

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmaselect.cache import contents
from mmaselect.cache.build import keys_of_views
from mmaselect.cache.contents import read_block, stamp_of


class Said:
    """Holds what it says of its samples as mmengine's data sets do."""

    def __init__(self, infos):
        parts = [pickle.dumps(info) for info in infos]
        self.infos, self.data_bytes = infos, np.frombuffer(b''.join(parts), np.uint8)
        self.data_address = np.cumsum([len(part) for part in parts])

    def __len__(self):
        return len(self.infos)


@pytest.fixture
def block(tmp_path, monkeypatch):
    """Returns a function that fingerprints six files in blocks of four, and says which were read."""
    # Files of this very moment are believed here.
    monkeypatch.setattr(contents, 'YOUNG', -(10**12))
    (tmp_path / 'images').mkdir()
    files = [tmp_path / 'images' / f'{number}.png' for number in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 10)

    def run(label='cat', folder=tmp_path / 'contents'):
        dataset, seen = Said([(str(file), label) for file in files]), []

        def read(index):
            seen.append(index)
            file = str(files[index])
            stamp = stamp_of([file])
            try:
                return hashlib.sha256(files[index].read_bytes()).digest(), [file], stamp
            except OSError as error:
                return error, [file], stamp

        with ThreadPoolExecutor(2) as pool:
            found = [read_block(folder, dataset, part, read, pool) for part in (range(4), range(4, 6))]
        digests = np.concatenate([part[0] for part in found])
        for index, file in enumerate(files):
            expected = hashlib.sha256(file.read_bytes()).digest() if file.exists() else bytes(32)
            assert digests[index].tobytes() == expected
        return sorted(seen), {index: str(error) for part in found for index, error in part[1].items()}

    run.files = files
    return run


def test_what_has_not_changed_is_not_read(block):
    assert block() == ([0, 1, 2, 3, 4, 5], {})
    assert block() == ([], {})
    # Without a folder, and where the data set says something else, nothing is known.
    assert block(folder=None)[0] == block(label='dog')[0] == [0, 1, 2, 3, 4, 5]


def overwrite(file):
    """The same size, and the time set back: the time of the inode is not."""
    before = file.stat()
    file.write_bytes(b'x' * 10)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file):
    other = file.with_name('other')
    other.write_bytes(b'y' * 10)
    other.replace(file)


def swap_folders(file):
    """The file is another, though none was touched."""
    folder = file.parent
    twin = folder.with_name('twin')
    twin.mkdir()
    for path in folder.iterdir():
        # Hard links: the same inodes.
        os.link(path, twin / path.name)
    (twin / file.name).unlink()
    (twin / file.name).write_bytes(b'z' * 10)
    folder.rename(folder.with_name('old'))
    twin.rename(folder)


@pytest.mark.parametrize('change', [overwrite, replace])
def test_what_has_changed_is_read(block, change):
    block()
    change(block.files[4])
    assert block() == ([4], {})
    assert block() == ([], {})


def test_another_file_under_the_same_name_is_read(block):
    block()
    swap_folders(block.files[2])
    # The links have touched all inodes.
    assert 2 in block()[0]


def test_what_cannot_be_read_is_tried_every_time(block):
    block()
    block.files[1].unlink()
    for _ in range(2):
        seen, errors = block()
        assert seen == list(errors) == [1]
    block.files[1].write_bytes(b'back')
    assert block() == ([1], {})


def test_a_damaged_memory_is_none(block, tmp_path):
    block()
    for file in (tmp_path / 'contents').iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    assert block()[0] == [0, 1, 2, 3, 4, 5]
    assert block()[0] == []


def test_young_files_are_read_every_time(block, monkeypatch):
    monkeypatch.setattr(contents, 'YOUNG', 10**15)
    assert block()[0] == block()[0] == [0, 1, 2, 3, 4, 5]


def test_every_view_of_every_sample_has_a_key_of_its_own():
    samples = np.frombuffer(b''.join(hashlib.sha256(bytes([number])).digest() for number in range(50)), np.uint8)
    keys = keys_of_views(samples.reshape(50, 32), 4, 0)
    assert keys.shape == (50, 4)
    other = keys_of_views(samples.reshape(50, 32), 4, 1)
    assert len(np.unique([keys, other])) == 400
    assert {len(key) for key in keys.ravel().tolist()} == {32}
    # A view does not depend on how many there are, nor on the other samples.
    assert np.array_equal(keys_of_views(samples.reshape(50, 32)[7:9], 2, 0), keys[7:9, :2])

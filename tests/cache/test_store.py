"""Shards: written whole, found by key, and never believed without their checksum."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple

import pytest
import torch

from mmaselect.cache.store import FeatureStore
from mmaselect.errors import InputError
from mmaselect.files import ABANDONED_AFTER, atomic_path


def rows(*names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {'maps': torch.randn(2, 3, 4, 4, generator=generator).bfloat16(), 'label': torch.tensor([len(name)])}
        for name in names
    }


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / 'cache')


def test_rows_come_back_as_they_went_in(store):
    first, second = rows('a', 'bb', seed=1), rows('ccc', seed=2)
    store.write(first)
    store.write(second)
    store.refresh()
    assert len(store) == 3
    assert 'a' in store
    assert 'd' not in store
    read = store.read(['ccc', 'a', 'ccc'])
    assert read['maps'].dtype == torch.bfloat16
    expected = [{**first, **second}[name] for name in ('ccc', 'a', 'ccc')]
    assert torch.equal(read['maps'], torch.stack([row['maps'] for row in expected]))
    assert read['label'].tolist() == [[3], [1], [3]]


def test_another_process_finds_them(store):
    store.write(rows('a'))
    other = FeatureStore(store.folder)
    other.refresh()
    assert torch.equal(other.read(['a'])['maps'][0], rows('a')['a']['maps'])
    # What is written meanwhile is found at the next look; what is gone is forgotten.
    path = store.write(rows('b'))
    assert 'b' not in other
    other.refresh()
    assert 'b' in other
    path.unlink()
    other.refresh()
    assert 'b' not in other
    assert 'a' in other


def test_the_same_rows_are_one_file(store):
    assert store.write(rows('a')) == store.write(rows('a'))
    assert len(store.shards()) == 1


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_it_short(path):
    os.truncate(path, path.stat().st_size // 2)


def empty_it(path):
    os.truncate(path, 0)


@pytest.mark.parametrize('damage', [flip_a_byte, cut_it_short, empty_it])
def test_damaged_shards_are_removed(store, damage, caplog):
    sound, damaged = store.write(rows('a')), store.write(rows('b'))
    damage(damaged)
    assert store.verify(store.shards()) == [damaged.stem]
    assert f'{damaged} does not have the checksum in its name' in caplog.text
    assert not damaged.exists()
    store.refresh()
    assert 'a' in store
    assert 'b' not in store
    assert store.verify([sound.stem]) == []


def test_what_has_not_changed_since_it_was_verified_is_believed(store):
    assert store.verified_until() == 0
    path, moment = store.write(rows('a')), store.clock()
    store.set_verified(moment)
    assert store.verified_until() == moment
    flip_a_byte(path)
    # Nobody reads what was last changed before.
    assert store.verify(store.shards(), since=path.stat().st_ctime_ns + 1) == []
    assert store.verify(store.shards(), since=store.verified_until()) == [path.stem]
    (store.folder / 'verified.json').write_text('{"verified_until": ')
    assert store.verified_until() == 0


def test_many_shards_are_found_in_order(store, monkeypatch):
    monkeypatch.setattr('mmaselect.cache.store.MAPPED', 2)
    for number in range(5):
        store.write(rows(f'{number}x', f'{number}y', 'twice', seed=number))
    store.refresh()
    assert len(store) == 11
    names = ['3y', 'twice', '0x', '4y']
    first = store.shards()[0]
    with_first = next(
        number
        for number in range(5)
        if store.write(rows(f'{number}x', f'{number}y', 'twice', seed=number)).stem == first
    )
    expected = [rows(f'{n}x', f'{n}y', 'twice', seed=n)[name]['maps'] for n, name in zip((3, with_first, 0, 4), names)]
    assert torch.equal(store.read(names)['maps'], torch.stack(expected))
    assert len(store._maps) == 2
    assert (store.find(['0x', 'none', '9x', '']) >= 0).tolist() == [True, False, False, False]
    with pytest.raises(KeyError, match='does not have all of these rows'):
        store.read(['0x', '0xx'])


def test_a_foreign_file_is_named(store):
    from safetensors.torch import save_file

    save_file({'x': torch.zeros(1)}, str(store.folder / f'{"a" * 64}.safetensors'))
    assert store.verify(store.shards()) == ['a' * 64]
    # Not verified, it is refused.
    save_file({'x': torch.zeros(1)}, str(store.folder / f'{"b" * 64}.safetensors'))
    with pytest.raises(InputError, match='is not a shard of features'):
        store.refresh()


def test_rows_of_two_shapes_are_refused(store):
    mixed = {**rows('a'), 'b': {'maps': torch.zeros(2, 3, 5, 4), 'label': torch.tensor([1])}}
    with pytest.raises(InputError, match=r'maps of \(2, 3, 4, 4\) and \(2, 3, 5, 4\) cannot be cached together'):
        store.write(mixed)
    assert not list(store.folder.iterdir())


def test_what_would_be_too_large_is_refused_before_it_is_begun(store, monkeypatch):
    store.require(2_000_000_000, 2)
    with pytest.raises(InputError, match=r'max_gb=1\.5 is less than the 2 GB that the features would take: take fewer'):
        store.require(2_000_000_000, 1.5)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: namedtuple('Usage', 'free')(10**9))
    with pytest.raises(InputError, match='has 1 GB free, but the features would take 2 GB'):
        store.require(2_000_000_000, None)


def test_a_full_disk_leaves_nothing_behind(store, monkeypatch):
    from pathlib import Path

    def full(self, content):
        self.open('wb').write(content[:10])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(InputError, match=r'safetensors cannot be written: No space left on device'):
        store.write(rows('a'))
    assert not list(store.folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='file/cache cannot be used as a cache: Not a directory'):
        FeatureStore(tmp_path / 'file' / 'cache')


def test_files_of_killed_writers_go_and_those_being_written_stay(store):
    long_ago = time.time() - 2 * ABANDONED_AFTER
    abandoned, young = store.folder / '.0f.x.tmp.safetensors', store.folder / '.1f.y.tmp.safetensors'
    for path in (abandoned, young):
        path.write_bytes(b'')
    os.utime(abandoned, (long_ago, long_ago))
    with atomic_path(store.folder / 'slow.json') as temporary:
        FeatureStore(store.folder)
        assert not abandoned.exists()
        assert young.exists()
        assert temporary.exists()
    assert (store.folder / 'slow.json').exists()

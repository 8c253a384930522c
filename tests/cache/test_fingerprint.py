"""What tells two values apart, and what does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmaselect.cache.fingerprint import fingerprint, source_of
from mmaselect.errors import InputError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def typed(value):
    """Python calls 1, 1.0 and True equal; a transform may not."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    return [typed(item) for item in value] if isinstance(value, list) else (type(value).__name__, str(value))


@given(VALUES, VALUES)
def test_equal_values_and_no_others_have_equal_fingerprints(first, second):
    assert (fingerprint(first) == fingerprint(second)) == (typed(first) == typed(second))


def test_the_order_of_keys_does_not_matter_and_that_of_items_does():
    assert fingerprint({'a': 1, 'b': 2}) == fingerprint({'b': 2, 'a': 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint(['ab', 'c']) != fingerprint(['a', 'bc'])


def test_arrays_differ_by_content_shape_and_type():
    arrays = [np.zeros(4), np.zeros((2, 2)), np.zeros(4, np.float32), np.ones(4), torch.zeros(4), torch.zeros(4, 1)]
    assert len({fingerprint(array) for array in arrays}) == len(arrays)
    assert fingerprint(np.zeros((2, 4))[:, ::2]) == fingerprint(np.zeros((2, 2)))


def test_files_count_by_what_is_in_them(tmp_path):
    for name, content in (('a', b'x'), ('b', b'x'), ('c', b'y')):
        (tmp_path / name).write_bytes(content)

    def info(name, index):
        return {'img_path': str(tmp_path / name), 'gt_label': np.array(3), 'sample_idx': index, 'seg_map_path': None}

    assert fingerprint(info('a', 0), files=True) == fingerprint(info('b', 7), files=True)
    assert fingerprint(info('a', 0), files=True) != fingerprint(info('c', 0), files=True)
    assert fingerprint({**info('a', 0), 'gt_label': np.array(4)}, files=True) != fingerprint(info('a', 0), files=True)
    with pytest.raises(InputError, match=r'gone cannot be read: No such file'):
        fingerprint(info('gone', 0), files=True)


def test_what_has_no_content_of_its_own_is_refused():
    with pytest.raises(InputError, match=r'a object \(<object object at .*cannot be told from another'):
        fingerprint({'pipeline': [object()]})
    assert fingerprint(np.mean) != fingerprint(np.median)


def test_edited_code_is_other_code(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / 'transform_of_ones_own.py'
    file.write_text('class Flip:\n    share = 0.5\n')
    flip = importlib.import_module('transform_of_ones_own').Flip
    before = source_of(flip)
    assert source_of(flip) == before
    file.write_text('"""A transform."""\n\n\nclass Flip:\n    """Flips."""  # half of them\n\n    share = 0.5\n')
    assert source_of(flip) == before
    file.write_text('class Flip:\n    share = 0.7\n')
    assert source_of(flip) != before

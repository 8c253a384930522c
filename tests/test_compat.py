"""Every repair, in a process of its own: what is broken without it works with it, and what works is left alone."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from mmaselect import compat


def python(code):
    """Runs code in a fresh interpreter that has not imported mmaselect."""
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


#: Hides a module from imports, as if it were not installed.
HIDE = """
import importlib.machinery
_find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name == {name!r} else _find(name, path, target))
"""


def test_torchvision_imports_and_a_sound_one_is_left_alone():
    raw = python('import torchvision')
    done = python(
        """
        import importlib.util, sys
        # compat alone, not the package, which would already have applied it
        spec = importlib.util.find_spec('mmaselect')
        path = spec.submodule_search_locations[0] + '/compat.py'
        spec = importlib.util.spec_from_file_location('compat', path)
        compat = importlib.util.module_from_spec(spec); spec.loader.exec_module(compat)
        defined = compat.define_torchvision_operators()
        import torchvision.transforms, torch
        assert callable(torch.ops.torchvision.nms)
        print(defined)
        """
    )
    assert done.returncode == 0, done.stderr
    broken = raw.returncode != 0
    assert done.stdout.strip() == str(broken)
    if broken:
        assert 'torchvision::nms does not exist' in raw.stderr


def test_mmseg_imports_with_mmcv_lite():
    raw = python('import mmaselect, sys; sys.modules.pop("mmcv._ext", None); import mmseg.models')
    done = python(
        """
        import mmaselect
        import mmseg.models, mmseg.apis, mmpretrain.models, mmpretrain.apis
        import mmcv.ops, torch
        try:
            mmcv.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
        except RuntimeError as error:
            print(error)
        """
    )
    assert done.returncode == 0, done.stderr
    if raw.returncode:
        assert "No module named 'mmcv._ext'" in raw.stderr
        assert "the op 'nms' needs the full mmcv, but mmcv-lite is installed" in done.stdout


def test_a_full_mmcv_is_left_alone(tmp_path):
    import importlib.machinery

    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text('')
    (tmp_path / 'mmcv' / f'_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}').write_bytes(b'')
    done = python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from mmaselect import compat
        sys.modules.pop('mmcv._ext', None)
        print(compat.provide_mmcv_extension(), 'mmcv._ext' in sys.modules)
        """
    )
    assert done.stdout.strip() == 'False False', done.stderr


def test_with_a_full_mmcv():
    """Its own operators, and mmseg's models beside them."""
    from importlib import metadata

    try:
        metadata.version('mmcv')
    except metadata.PackageNotFoundError:
        pytest.skip('mmcv-lite is installed, which has no operators: install the full mmcv to run this')
    done = python(
        """
        import mmaselect, mmcv, torch
        from mmcv.ops import nms
        import mmseg.models
        boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 4.1], [8., 8., 9., 9.]])
        print(len(nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1]))
        """
    )
    assert done.stdout.strip() == '2', done.stderr


def test_mmengine_checkpoints_load_without_unpickling_code(tmp_path):
    make = f"""
        import torch
        from mmengine.logging import MessageHub
        hub = MessageHub.get_instance('test')
        hub.update_scalar('train/loss', 0.5); hub.update_info('epoch', 3)
        torch.save(dict(message_hub=hub.state_dict()), {str(tmp_path / 'c.pth')!r})
    """
    load = f"print(torch.load({str(tmp_path / 'c.pth')!r})['message_hub']['log_scalars']['train/loss'].current())"
    assert python(make).returncode == 0
    raw = python('import torch\n' + load)
    assert raw.returncode != 0
    assert 'Weights only load failed' in raw.stderr
    done = python('import torch, mmaselect\n' + load)
    assert done.stdout.strip() == '0.5', done.stderr


class Lookup:
    """Pickles as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.arguments = (owner, name)

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize('name', ('__init__', '__class__', 'register_statistics'))
def test_a_checkpoint_may_not_look_up_anything_else(tmp_path, name):
    torch.save({'x': Lookup(HistoryBuffer, name)}, tmp_path / 'c.pth')
    with pytest.raises(pickle.UnpicklingError, match=f'may not look up {name!r}'):
        torch.load(tmp_path / 'c.pth', weights_only=True)
    torch.save({'x': Lookup(torch.nn.Module, 'max')}, tmp_path / 'c.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'c.pth', weights_only=True)
    with pytest.raises(pickle.UnpicklingError, match='may not look up'):
        compat._history_buffer_attribute(os, 'system')


def test_configs_inherit_across_packages():
    code = """
        from mmengine.config import Config
        from pathlib import Path
        import tempfile
        folder = Path(tempfile.mkdtemp())
        (folder / 'c.py').write_text("_base_ = ['mmpretrain::_base_/default_runtime.py']")
        print(Config.fromfile(folder / 'c.py').default_scope)
    """
    present = python('import mmaselect\n' + textwrap.dedent(code))
    assert present.stdout.strip() == 'mmpretrain', present.stderr
    hidden = HIDE.format(name='pkg_resources')
    raw = python(hidden + textwrap.dedent(code))
    assert raw.returncode != 0
    assert "No module named 'pkg_resources'" in raw.stderr
    mended = python(hidden + 'import mmaselect\n' + textwrap.dedent(code))
    assert mended.stdout.strip() == 'mmpretrain', mended.stderr


def test_an_mmcv_that_mmseg_refuses_is_named(monkeypatch):
    from importlib import metadata

    versions = {'mmcv-lite': '2.2.0', 'mmsegmentation': '1.2.2'}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, 'version', version)
    with pytest.warns(UserWarning, match=r'mmsegmentation 1.2.2 does not import with mmcv 2.2.0'):
        assert compat.check_mmcv_version()
    versions['mmcv-lite'] = '2.1.0'
    assert not compat.check_mmcv_version()
    del versions['mmsegmentation']
    versions['mmcv-lite'] = '2.2.0'
    assert not compat.check_mmcv_version()


def test_importing_is_cheap():
    done = python(
        """
        import sys, mmengine.runner
        before = set(sys.modules)
        import mmaselect
        new = {name.split('.')[0] for name in set(sys.modules) - before}
        print(sorted(new & {'mmpretrain', 'mmseg', 'diffusers', 'torchvision', 'matplotlib', 'sklearn'}))
        """
    )
    assert done.stdout.strip() == '[]', done.stderr

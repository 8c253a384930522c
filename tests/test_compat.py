"""Every repair, in a process of its own: what is broken without it works with it, and what works is left alone."""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import needs_torch, run_code
from mmengine.logging.history_buffer import HistoryBuffer

from mmaselect import compat

#: Hides a module from imports, as if it were not installed.
HIDE = """
import importlib.machinery
_find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name == {name!r} else _find(name, path, target))
"""


#: Loads compat alone: the package would apply it at once. What compat imports of it comes from an empty one.
COMPAT = f"""
import importlib.util, sys, types
sys.modules['mmaselect'] = types.ModuleType('mmaselect')
sys.modules['mmaselect'].__path__ = [{os.path.dirname(compat.__file__)!r}]
spec = importlib.util.spec_from_file_location('compat', {compat.__file__!r})
compat = importlib.util.module_from_spec(spec)
sys.modules['compat'] = compat
spec.loader.exec_module(compat)
"""

#: What torchvision meets where its compiled library does not fit torch.
NO_LIBRARY = """
import torch
_load = torch.ops.load_library
def _fails(path):
    if 'torchvision' in str(path):
        raise OSError('undefined symbol')
    _load(path)
torch.ops.load_library = _fails
"""


@needs_torch('2.6', 'a torchvision that does not import without its library')
def test_torchvision_whose_library_does_not_load_is_repaired():
    raw = run_code(NO_LIBRARY + 'import torchvision')
    assert raw.returncode != 0
    assert 'RuntimeError: operator torchvision::nms does not exist' in raw.stderr
    code = """
        import mmaselect
        {first}
        import torchvision, torchvision.transforms.functional as functional
        assert callable(torch.ops.torchvision.nms)
        print(functional.hflip(torch.arange(3.)[None, None]).flatten().tolist())
        assert 'torchvision' not in [getattr(one, 'watches', None) for one in sys.meta_path]
    """
    # A look at whether it is installed, as diffusers takes one, is no import.
    for first in ('import sys', 'import sys, importlib.util; assert importlib.util.find_spec("torchvision")'):
        done = run_code(NO_LIBRARY + textwrap.dedent(code.format(first=first)))
        assert done.stdout.strip() == '[2.0, 1.0, 0.0]', done.stderr


def test_two_copies_of_it_do_not_ask_each_other():
    done = run_code(f"""{NO_LIBRARY}{COMPAT}
compat.watch_imports(compat.REPAIRS)
{COMPAT}
compat.watch_imports(compat.REPAIRS)
watched = [one.watches for one in sys.meta_path if hasattr(one, 'watches')]
assert sorted(watched) == sorted(compat.REPAIRS), watched
sys.meta_path.insert(0, compat._Watch('torchvision', compat.REPAIRS['torchvision']))
import torchvision
""")
    assert done.returncode == 0, done.stderr


def test_another_failure_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision' / '__init__.py').write_text('import torch\nraise RuntimeError("quite another")')
    done = run_code(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mmaselect, torchvision
    """)
    assert done.returncode != 0
    assert done.stderr.strip().endswith('RuntimeError: quite another')


def test_torchvision_that_loads_gets_no_operator_from_us():
    """A second declaration aborts the process: this is how version 0.1.0 ended beside torch 2.14.1."""
    script = 'import {}torch, torchvision; print(sorted(torch._C._dispatch_get_all_op_names()))'
    raw, done = run_code(script.format('')), run_code(script.format('mmaselect, '))
    assert done.returncode == 0, done.stderr
    ours = {'torchvision::nms', 'torchvision::qnms'}
    if raw.returncode:
        assert ours <= set(ast.literal_eval(done.stdout))
    else:
        of_torchvision = [
            {name for name in ast.literal_eval(run.stdout) if name.startswith('torchvision')} for run in (raw, done)
        ]
        assert of_torchvision[0] == of_torchvision[1]


def test_a_healthy_stack_keeps_no_trace(tmp_path):
    """Operators, patched attributes, modules, finders, loaders and warnings, with the repairs and without."""
    multimodal = ('mmpretrain', 'mmpretrain/models', 'mmpretrain/models/multimodal')
    for name in ('torchvision', 'mmcv', 'mmcv/ops', 'mmcv/_ext', 'pkg_resources', *multimodal):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('')
    (tmp_path / 'mmcv/ops/__init__.py').write_text('import mmcv._ext')
    code = f"""
        import json, sys, warnings
        sys.path.insert(0, {str(tmp_path)!r})
        import numpy, torch, mmengine.runner, mmengine.device.utils, importlib.metadata
        mmengine.device.utils.DEVICE = 'cuda'
        APPLY
        import torchvision, mmcv.ops, pkg_resources, mmpretrain.models.multimodal
        from mmengine.dist import utils
        from mmengine.model import MMDistributedDataParallel
        for name in ('compat', 'mmaselect', 'mmaselect.unpickling'):
            sys.modules.pop(name, None)
        watched = (torchvision, mmcv.ops, mmcv._ext, pkg_resources, mmpretrain.models.multimodal)
        print(json.dumps(dict(
            operators=sorted(torch._C._dispatch_get_all_op_names()),
            attributes=[f.__qualname__ + str(hasattr(f, '__wrapped__'))
                        for f in (utils._init_dist_pytorch, MMDistributedDataParallel.__init__)],
            modules=sorted(sys.modules),
            finders=[str(type(one)) for one in sys.meta_path],
            loaders=[str(type(one)) for m in watched for one in (m.__loader__, m.__spec__.loader)],
            files=[m.__file__ for m in watched],
            warnings=[str(one) for one in warnings.filters],
        )))
    """
    raw, done = (
        run_code(textwrap.dedent(code).replace('APPLY', apply))
        for apply in ('', COMPAT + 'compat.apply(lambda: None); del compat')
    )
    assert done.returncode == 0, done.stderr
    assert raw.returncode == 0, raw.stderr
    assert json.loads(done.stdout) == json.loads(raw.stdout)
    assert str(tmp_path) in raw.stdout


def test_without_an_accelerator_two_functions_of_mmengine_are_wrapped_once():
    done = run_code(
        """
        import mmengine.device.utils
        mmengine.device.utils.DEVICE = 'cpu'
        from mmengine.dist import utils
        from mmengine.model import MMDistributedDataParallel
        import mmaselect
        wrapped = utils._init_dist_pytorch, MMDistributedDataParallel.__init__
        mmaselect.compat.apply(lambda: None)
        assert wrapped == (utils._init_dist_pytorch, MMDistributedDataParallel.__init__)
        print([f.__wrapped__.__module__ for f in wrapped])
        """
    )
    assert done.stdout.strip() == "['mmengine.dist.utils', 'mmengine.model.wrappers.distributed']", done.stderr


def test_mmseg_imports_with_mmcv_lite():
    raw = run_code('import mmcv.ops')
    done = run_code(
        """
        import mmaselect
        import mmseg.models, mmseg.apis, mmpretrain.models, mmpretrain.apis
        import mmcv.ops, torch
        from mmengine.utils.dl_utils.misc import mmcv_full_available
        boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 3], [5, 5, 6, 6.0]])
        print(mmcv.ops.nms(boxes, torch.tensor([0.1, 0.9, 0.5]), 0.5)[1].tolist())
        try:
            print(len(mmcv.ops.roi_align(torch.rand(1, 1, 4, 4), torch.zeros(2, 5), 2)))
        except RuntimeError as error:
            print(error)
        try:
            print(mmcv.ops.nms(boxes, torch.ones(3), 0.5, offset=1)[1].tolist())
        except RuntimeError as error:
            print(error)
        print(mmcv_full_available())
        """
    )
    assert done.returncode == 0, done.stderr
    if raw.returncode:
        assert "No module named 'mmcv._ext'" in raw.stderr
        kept, aligned, shifted, full = done.stdout.strip().splitlines()
        assert kept == '[1, 2]'
        assert aligned.startswith("the op 'roi_align_forward' needs the full mmcv, but mmcv-lite is installed")
        assert shifted == "the op 'nms' with offset=1 needs the full mmcv (pip install mmcv)"
        assert full == 'False'
    else:
        assert done.stdout.split('\n')[:2] == ['[1, 2]', '2']
        assert done.stdout.strip().endswith('True')


def test_multimodal_models_that_do_not_import_are_left_out():
    """As with transformers 5: here a module of theirs is broken, whatever the version."""
    code = """
        import mmpretrain.models
        from mmpretrain.registry import MODELS
        print(sorted({'ResNet', 'Blip2Retrieval'} & set(MODELS.module_dict)))
        try:
            MODELS.build(dict(type='Blip2Retrieval'))
        except Exception as error:
            print(error)
    """
    breaks = "import sys\nsys.modules['mmpretrain.models.multimodal.ram'] = None\n"
    raw = run_code(breaks + textwrap.dedent(code))
    assert raw.returncode != 0
    done = run_code(breaks + 'import mmaselect\n' + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['Blip2Retrieval', 'ResNet']")
    assert 'mmpretrain[multimodal]' in done.stdout


def test_a_full_mmcv_that_does_not_load_says_so(tmp_path):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / 'mmcv' / 'ops').mkdir(parents=True)
    (tmp_path / 'mmcv' / '__init__.py').write_text('')
    (tmp_path / 'mmcv' / 'ops' / '__init__.py').write_text('import mmcv._ext')
    (tmp_path / 'mmcv' / f'_ext{suffix}').write_bytes(b'')
    done = run_code(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import mmaselect, mmcv.ops
    """)
    assert done.returncode != 0
    assert f'_ext{suffix}: file too short' in done.stderr


def test_with_a_full_mmcv():
    """Its own operators, which we leave alone, and the toolboxes' models beside them."""
    spec = importlib.util.find_spec('mmcv._ext')
    if spec is None or spec.origin is None:  # not there, or our stand-in
        pytest.skip('mmcv-lite is installed, which has no operators: install the full mmcv to run this')
    done = run_code(
        """
        import sys
        import mmaselect, torch
        from mmcv.ops import nms
        import mmdet.models, mmseg.models, mmcv._ext
        boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 4.1], [8., 8., 9., 9.]])
        print([nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5, offset=offset)[1].tolist() for offset in (0, 1)])
        print(type(mmcv._ext).__name__, mmcv._ext.__file__.endswith('.so'))
        print(type(mmcv.ops.__loader__).__name__, mmcv.ops.nms.__module__)
        print('mmcv.ops' in [getattr(finder, 'watches', None) for finder in sys.meta_path])
        """
    )
    assert done.returncode == 0, done.stderr
    expected = ['[[0, 2], [0, 2]]', 'module True', 'SourceFileLoader mmcv.ops.nms', 'False']
    assert done.stdout.splitlines() == expected, done.stderr


def test_mmengine_checkpoints_load_without_unpickling_code(tmp_path):
    make = f"""
        import torch
        from mmengine.logging import MessageHub
        hub = MessageHub.get_instance('test')
        hub.update_scalar('train/loss', 0.5); hub.update_info('epoch', 3)
        torch.save(dict(message_hub=hub.state_dict()), {str(tmp_path / 'c.pth')!r})
    """
    # The default since torch 2.6.
    weights = f'torch.load({str(tmp_path / "c.pth")!r}, weights_only=True)'
    load = f"print({weights}['message_hub']['log_scalars']['train/loss'].current())"
    assert run_code(make).returncode == 0
    raw = run_code('import torch\n' + load)
    assert raw.returncode != 0
    assert 'Weights only load failed' in raw.stderr
    done = run_code('import torch, mmaselect, mmengine\n' + load)
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
    present = run_code('import mmaselect\n' + textwrap.dedent(code))
    assert present.stdout.strip() == 'mmpretrain', present.stderr
    hidden = HIDE.format(name='pkg_resources')
    raw = run_code(hidden + textwrap.dedent(code))
    assert raw.returncode != 0
    assert "No module named 'pkg_resources'" in raw.stderr
    mended = run_code(hidden + 'import mmaselect\n' + textwrap.dedent(code))
    assert mended.stdout.strip() == 'mmpretrain', mended.stderr


def test_an_mmcv_that_mmseg_refuses_is_named(monkeypatch):
    from importlib import metadata

    versions = {'mmcv-lite': '2.2.0', 'mmsegmentation': '1.2.2'}

    def version(installed, name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, 'version', functools.partial(version, versions))
    with pytest.warns(UserWarning, match=r'mmsegmentation 1.2.2 does not import with mmcv 2.2.0'):
        compat.check_mmcv_version()
    for changed in ({'mmcv-lite': '2.1.0'}, {'mmsegmentation': None}):
        others = {name: version for name, version in {**versions, **changed}.items() if version is not None}
        monkeypatch.setattr(metadata, 'version', functools.partial(version, others))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            compat.check_mmcv_version()


def test_importing_is_cheap():
    """It needs neither torch nor mmengine; what it registers, no toolbox."""
    code = """
        import sys, time
        before = time.process_time()
        import mmaselect
        used = time.process_time() - before
        from mmaselect import cli, compat
        packages = lambda: {name.split('.')[0] for name in sys.modules}
        print(sorted(packages() & {'torch', 'mmengine', 'numpy', 'diffusers'}))
        import mmengine.runner
        print(sorted(packages() & {'mmpretrain', 'mmseg', 'diffusers', 'torchvision', 'sklearn'}))
        print(used)
    """
    # In an interpreter that has imported nothing.
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *packages, used = done.stdout.split()
    assert packages == ['[]', '[]'], done.stderr
    assert float(used) < 0.3


#: Imports each name in a fork: alone, and mmengine behind it; prints what is missing from the registries then.
FIRST = """
import importlib, os, sys
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        assert 'mmengine' not in sys.modules
        importlib.import_module('mmaselect')
        package, _, attribute = name.partition(':')
        module = importlib.import_module(package)
        if attribute:
            getattr(module, attribute)
        import mmaselect
        from mmengine.config.utils import MODULE2PACKAGE
        from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
        named = dict(WarpedPairs=DATASETS, LoadLabelMap=TRANSFORMS)
        for one in mmaselect._REGISTERED:
            named[one] = HOOKS if one.endswith('Hook') else METRICS if one == 'PCK' else MODELS
        missing = [one for one, registry in named.items() if registry.module_dict.get(one) is None]
        print(name, MODULE2PACKAGE['mmaselect'], *missing, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_whatever_is_imported_first_all_is_registered():
    """Each module that others of ours take names from, and each way to a name."""
    ours = ('backbones', 'cache', 'datasets', 'hooks', 'matchers', 'necks', 'evaluation.pck', 'evaluation.leaderboard')
    names = [f'mmaselect.{one}' for one in ours] + ['mmengine.runner', 'mmaselect:ASelectDiT', 'mmaselect:PCK']
    done = run_code(FIRST, *names)
    assert done.stdout.splitlines() == [f'{name} mmaselect' for name in names], done.stderr[-3000:]

"""Models and data made on the spot, once per session."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path

#: Two cores: one for each of two workers, or both for a run without workers. OpenMP waits by spinning: two workers of
#: two threads each take up to ten times as long. This comes before what reads it is imported; a tool that a test runs
#: in this process obeys it, too.
os.environ['OMP_NUM_THREADS'] = '1' if 'PYTEST_XDIST_WORKER' in os.environ else '2'

import pytest
import torch
from forks import Forks, leave_configs_unformatted, read_metafiles_once
from packaging.version import Version

import mmaselect

leave_configs_unformatted()
read_metafiles_once()


def pytest_addoption(parser):
    parser.addoption('--soak', action='store_true', help='run the harnesses in full: kills, ranks, long runs')


def needs(package, least, what):
    """Marks a test of what older versions of a package do not have."""
    old = Version(metadata.version(package)) < Version(least)
    return pytest.mark.skipif(old, reason=f'{what} needs {package} >= {least}')


needs_torch = functools.partial(needs, 'torch')
#: mmengine 0.10.1 reads the data from its beginning.
needs_exact_resume = needs('mmengine', '0.10.6', 'an exact resume of iterations')


def set_hub(monkeypatch, **values):
    """Sets constants of huggingface_hub, by name; 0.23 has copies of them where it downloads, and in open sessions."""
    from huggingface_hub import constants, file_download, utils

    for name, value in values.items():
        for module in (constants, file_download):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    getattr(utils._http, 'reset_sessions', lambda: None)()


#: What takes longest is begun first, so that neither of two workers waits for the other at the end.
LONGEST = (
    'test_tools', 'test_configs', 'test_hook', 'test_faults', 'test_evaluation', 'test_readme', 'test_compat',
    'test_segmentation', 'test_benchmark', 'test_toolboxes', 'test_long_runs', 'test_notebook', 'test_disks',
    'test_detection', 'test_matcher',
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Orders the files; within one, tests stay as they are."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    from mmaselect.diffusion.families import FAMILIES

    for family in FAMILIES.values():
        if family.is_available():
            continue
        reason = f'{family.name} needs diffusers >= {family.least_diffusers}'
        for item in items:
            if family.name.lower() in re.sub(r'[-_.]', '', item.nodeid.lower()):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope='module', autouse=True)
def spare_what_is_left():
    """Every data set of mmengine's collects garbage when it is built, for 0.3 seconds among a million old objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def soak(request):
    """Whether the harnesses run in full."""
    return request.config.getoption('--soak')


#: Real architectures, scaled down: every switch of the real model that changes the code path is kept.
TINY = {
    'SD3': dict(
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        sample_size=8,
        in_channels=16,
        out_channels=16,
    ),
    'DiT': dict(
        num_layers=4, num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8
    ),
}
TINY['SD3.5-medium'] = dict(TINY['SD3'], dual_attention_layers=(0, 1), qk_norm='rms_norm')
TINY['SD3.5-large'] = dict(TINY['SD3'], qk_norm='rms_norm')
TINY['SiT'] = TINY['DiT']


def family_of(variant: str) -> str:
    """``'SD3.5-medium'`` is of family ``'SD3'``."""
    return 'SD3' if variant.startswith('SD3') else variant


def make_transformer(variant: str, seed: int = 0) -> torch.nn.Module:
    """A whole diffusers transformer with random weights in which no gate is zero."""
    from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

    from mmaselect.diffusion.loading import initialise

    cls = SD3Transformer2DModel if family_of(variant) == 'SD3' else DiTTransformer2DModel
    model = cls(**TINY[variant])
    initialise(model, seed)
    return model.eval()


def make_vae(channels: int) -> torch.nn.Module:
    """A small AutoencoderKL with 8 image pixels per latent pixel, like the real ones."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.5,
        shift_factor=0.1 if channels == 16 else None,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    ).eval()


def make_tiny(folder: Path, channels: int = 4, width: int = 8) -> Path:
    """A raw encoder of the TAESD project, 8 pixels per latent pixel, with the pooling branch; see tiny.py."""
    from safetensors.torch import save_file

    from mmaselect.diffusion.latent import TinyEncoder

    config = dict(latent_channels=channels, encoder_block_out_channels=[width] * 4, num_encoder_blocks=[1, 1, 1, 2])
    torch.manual_seed(0)
    encoder = TinyEncoder({**config, 'encoder_pooling_channels': {'7': 4 * width, '8': 4 * width}}).encoder.layers
    folder.mkdir(parents=True, exist_ok=True)
    save_file(encoder.state_dict(), folder / 'tiny_encoder.safetensors')
    return folder


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    """Returns a function that saves a pipeline folder of a variant, once, and gives its path."""
    made: dict[tuple[str, bool], Path] = {}

    def make(variant: str, sharded: bool = False) -> Path:
        if (variant, sharded) not in made:
            folder = tmp_path_factory.mktemp(variant.replace('.', '_'))
            size = '100KB' if sharded else '10GB'
            make_transformer(variant).save_pretrained(folder / 'transformer', max_shard_size=size)
            make_vae(TINY[variant]['in_channels']).save_pretrained(folder / 'vae')
            if family_of(variant) == 'SD3':
                from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
                from mmaselect.diffusion.loading import Source

                embeds = dict(prompt_embeds=torch.randn(1, 5, 32), pooled_prompt_embeds=torch.randn(1, 24))
                save_prompt(default_prompt_file(Source(folder)), embeds, '', 'tiny')
            (folder / 'scheduler').mkdir()
            scheduler = dict(beta_start=2e-4, beta_end=1e-2, beta_schedule='linear', num_train_timesteps=1000)
            (folder / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(scheduler))
            made[variant, sharded] = folder
        return made[variant, sharded]

    return make


ROOT = Path(__file__).parents[1]
#: Real photographs and street scenes, where the machine has them; they are never part of the project.
SHARED_DATA = ROOT.parent / 'shared' / 'data'


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    """A wheel built from a copy of the source, so that nothing is left in the source's ``build/``."""
    import shutil

    source = tmp_path_factory.mktemp('source') / 'mmaselect'
    skip = shutil.ignore_patterns('.git', '.venv*', '.mim', '__pycache__', 'work_dirs', 'data', 'build', '*.egg-info')
    shutil.copytree(ROOT, source, ignore=skip)
    out = tmp_path_factory.mktemp('wheel')
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', str(source), '--no-deps', '--no-build-isolation', '-w', str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.glob('*.whl')
    return file


ENVIRONMENT = {**os.environ, 'HF_HUB_OFFLINE': '1'}


@functools.cache
def forks(imports='tools'):
    """The process of which tools are forks, or scripts of others; it ends with this one."""
    return Forks(ENVIRONMENT, imports)


def run_tool(tool, *args):
    """Runs ``python tools/TOOL ARGS`` in a process of its own."""
    return forks().run(ROOT / 'tools' / tool, *map(str, args))


def start_tool(tool, *args, env=None):
    """Starts ``python tools/TOOL ARGS`` in a process of its own, with variables beside the test's own."""
    return forks().start(ROOT / 'tools' / tool, *map(str, args), env=env)


def run_script(path, *args):
    """Runs a script of a toolbox, which imports in an order of its own: nothing of ours or of the stack's before."""
    return forks('others').run(path, *map(str, args))


def run_code(code, *args):
    """Runs code as :func:`run_script` runs a script."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, 'script.py')
        script.write_text(textwrap.dedent(code))
        return run_script(script, *args)


def error_line(done):
    """The one line that bad input gets: the last on stderr, of a process that failed, without a traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    assert 'Traceback' not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ')
    return line


PORTS = itertools.count(os.getpid() % 200 * 100)


def free_port():
    """A port that nobody listens on, and that the system gives to nobody.

    Ranks use it seconds later. The system gives away ports from 32768 on, also for gloo's connections. Had it given
    away this one in between, the first rank would fail, and the others would wait for it.
    """
    for number in PORTS:
        port = 10000 + number % 20000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(('127.0.0.1', port))
            return str(port)


def start_ranks(count, tool, *arguments, env=None):
    """Starts a tool in several processes, as Slurm does: nobody watches over them."""
    shared = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': str(count), 'OMP_NUM_THREADS': '1'}
    return [
        start_tool(tool, *arguments, '--launcher', 'pytorch',
                   env={**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank), **(env or {})})
        for rank in range(count)
    ]  # fmt: skip


def launch(script, *arguments):
    """Runs ``dist_train.sh`` or ``dist_test.sh``, with the python of this environment first on the path."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    environment = {**os.environ, 'PORT': free_port(), 'OMP_NUM_THREADS': '1', 'PATH': path}
    # Those of the installed package: beside a wheel, the checkout's would put the checkout in front.
    tools = Path(mmaselect.__file__).parent / '.mim' / 'tools'
    command = ['bash', str(tools / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def accuracies(text):
    """Every validation's accuracy in a log."""
    return [float(value) for value in re.findall(r'accuracy/top1: ([\d.]+)', text)]


@pytest.fixture
def call_tool(monkeypatch):
    """Returns a function that runs a tool in this process, which saves the seconds of a start.

    It gives what :func:`run_tool` gives. Runs that succeed are better made in a process of their own: a runner leaves
    its scope, logger and message hub behind.
    """
    import runpy

    def call(tool, *args):
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, args)])
        # Not pytest's capture: loggers keep the stream they were made with, and that one is closed after each test.
        out, err = io.StringIO(), io.StringIO()
        code = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

    return call


#: The demo's config.
DEMO = ROOT / 'configs/demo/dit-nano_linear_bs64-20e_digits-16px.py'


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """150 training and 60 test digits in mmpretrain's folder layout."""
    import shutil

    full, folder = tmp_path_factory.mktemp('digits'), tmp_path_factory.mktemp('few')
    done = run_tool('dataset_converters/prepare_digits.py', full)
    assert done.returncode == 0, done.stderr
    assert '1200 training and 597 test images' in done.stdout
    assert len(list(full.glob('train/*/*.png'))) == 1200
    for split, count in (('train', 15), ('test', 6)):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
            for file in sorted((full / split / str(digit)).iterdir())[:count]:
                shutil.copy(file, folder / split / str(digit))
    return folder


def options(data, **more):
    """``--cfg-options`` that make the demo's config short; ``data`` is what the ``digits`` fixture gives."""
    values = {f'{split}_dataloader.dataset.data_root': data for split in ('train', 'val', 'test')}
    values |= {
        'custom_hooks.0.timesteps': '[0,400,900]',
        'custom_hooks.0.num_images': 40,
        'custom_hooks.0.batch_size': 16,
        'train_cfg.max_epochs': 3,
        'train_cfg.val_interval': 1,
        'train_dataloader.batch_size': 8,
        'default_hooks.logger.interval': 1,
        **more,
    }
    return ['--cfg-options', *(f'{key}={value}' for key, value in values.items())]


@pytest.fixture(scope='session')
def trained(digits, tmp_path_factory):
    """Three epochs of the demo's config: the work directory, which stays as it is, and what was printed."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    done = run_tool('train.py', DEMO, '--work-dir', folder, *options(digits))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout

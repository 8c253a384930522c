"""What README shows under "In a project of your own" and "From Python", block by block, with the installed wheel.

Nothing of the checkout can be imported or run here: the wheel lies in an environment of its own, which finds all other
packages in the tests' environment. The hub's cache holds a miniature under the name that README uses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, TINY, make_transformer, make_vae
from forks import Forks
from miniatures import make, write_image

HUB_ID = 'stabilityai/stable-diffusion-3.5-medium'


def blocks(heading, language):
    """The code blocks of a section of README."""
    section = re.search(rf'^## {heading}\n(.*?)^## ', (ROOT / 'README.md').read_text(), re.DOTALL | re.MULTILINE)[1]
    return re.findall(rf'```{language}\n(.*?)```', section, re.DOTALL)


@pytest.fixture(scope='module')
def run(wheel, tmp_path_factory):
    """Returns a function that runs a script in the environment with the wheel, by name one of its own.

    They run in a folder of their own, in forks of its interpreter that has imported nothing of the stack.
    """
    environment, folder = tmp_path_factory.mktemp('environment'), tmp_path_factory.mktemp('project')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', environment], check=True)
    paths = sysconfig.get_paths(vars={'base': str(environment), 'platbase': str(environment)})
    Path(paths['purelib'], 'others.pth').write_text(sysconfig.get_path('purelib'))
    pip = [
        sys.executable,
        '-m',
        'pip',
        '--python',
        Path(paths['scripts'], 'python'),
        'install',
        '-q',
        '--no-deps',
        '--ignore-installed',
    ]
    subprocess.run([*pip, wheel], check=True)
    hub = hub_cache(tmp_path_factory.mktemp('hub'))
    variables = {**ENVIRONMENT, 'HF_HUB_CACHE': str(hub), 'MMASELECT_CACHE': str(hub / 'prompts')}
    variables.pop('PYTHONPATH', None)

    scripts = Path(paths['scripts'])
    forks = Forks(variables, 'others', scripts / 'python', folder)

    def run(script, *args):
        done = forks.run(scripts / script, *map(str, args))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def run_code(code):
        (folder / 'code.py').write_text(code)
        return run(folder / 'code.py')

    run.folder, run.code, run.scripts = folder, run_code, scripts
    where = run_code('import mmaselect; print(mmaselect.__file__)')
    assert where.strip().startswith(str(environment))
    return run


def hub_cache(folder):
    """A cache of the hub with SD3.5-medium in miniature: 14 blocks, as README reads block 12."""
    import torch

    from mmaselect.diffusion.conditioning import save_prompt

    repository = folder / f'models--{HUB_ID.replace("/", "--")}'
    snapshot = repository / 'snapshots' / 'c0ffee'
    TINY['SD3.5-medium, 14 blocks'] = dict(TINY['SD3.5-medium'], num_layers=14)
    make_transformer('SD3.5-medium, 14 blocks').save_pretrained(snapshot / 'transformer')
    make_vae(16).save_pretrained(snapshot / 'vae')
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('c0ffee')
    embeds = dict(prompt_embeds=torch.randn(1, 5, 32), pooled_prompt_embeds=torch.randn(1, 24))
    save_prompt(folder / 'prompts' / HUB_ID / 'prompt_embeds.safetensors', embeds, '', HUB_ID)
    return folder


@pytest.fixture(scope='module')
def project(run):
    """A project of one's own: a config of mmpretrain's with README's change, and options for a machine like this."""
    (change,) = blocks('In a project of your own', 'python')
    config = run.folder / 'mine.py'
    config.write_text(f"_base_ = ['mmpretrain::resnet/resnet50_8xb8_cub.py']\n{change}")
    data = make('CUB', run.folder / 'cub')
    options = ['--cfg-options', 'train_cfg.max_epochs=1', 'model.head.in_channels=64']
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={data}',
            f'{split}_dataloader.num_workers=0',
            # mmpretrain's tools switch this on, which torch refuses without workers.
            f'{split}_dataloader.persistent_workers=False',
            f'{split}_dataloader.dataset.pipeline.1.scale=72',
            f'{split}_dataloader.dataset.pipeline.2.crop_size=64',
        ]
    return config, options


def test_the_toolbox_s_own_script_with_the_change(run, project):
    import mmpretrain

    config, options = project
    script = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'train.py'
    printed = run(script, config, '--work-dir', 'theirs', *options)
    assert 'accuracy/top1' in printed
    selection = json.loads((run.folder / 'theirs' / 'selection.json').read_text())
    assert (selection['block'], selection['component'], selection['num_images']) == (12, 'query', 6)
    assert len(selection['timesteps']) == 21


def test_the_commands(run, project):
    config, options = project
    _, commands = blocks('In a project of your own', 'bash')
    printed = []
    for line in commands.splitlines():
        name, *args = line.partition('#')[0].split()
        assert name == 'mmaselect'
        values = {'CONFIG': config, 'CHECKPOINT': 'ours/epoch_1.pth'}
        args = [values.get(arg, arg) for arg in args]
        printed.append(run(name, *args, '--work-dir', 'ours', *options))
    selected, trained, tested = printed
    said = r'^timestep \d+, block 12, query -> .*ours/selection.json, selection.png, report.html$'
    assert re.search(said, selected, re.MULTILINE)
    assert (run.folder / 'ours' / 'selection.png').read_bytes().startswith(b'\x89PNG')
    accuracies = [re.findall(r'accuracy/top1: ([\d.]+)', text)[-1] for text in (trained, tested)]
    assert accuracies[0] == accuracies[1]


def test_from_python(run):
    (code,) = blocks('From Python', 'python')
    assert "device='cuda'" in code
    for index in range(8):
        write_image(run.folder / 'folder' / 'of' / 'images' / f'{index}.png', index)
    given = 'import torch\nimages = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)\n'
    shown = '\nprint(tuple(features.shape), features.isfinite().all().item())'
    printed = run.code(given + code.replace("device='cuda'", "device='cpu'") + shown)
    choice, shape = printed.strip().splitlines()[-2:]
    timestep, block, component, agreement = choice.split()
    assert 0 <= float(timestep) <= 1000
    assert 0 <= int(block) < 14
    assert component in ('query', 'key', 'value', 'attention', 'output')
    assert 0 <= float(agreement) <= 1
    assert shape == '(3, 64) True'


def test_what_is_installed_is_what_readme_says():
    """``make newest`` takes this line out of README."""
    install, _ = blocks('In a project of your own', 'bash')
    extras = re.match(r"pip install 'mmaselect\[([\w,]+)\]' ", install)[1]
    assert {f'{name}.txt' for name in extras.split(',')} <= set(os.listdir(ROOT / 'requirements'))


def test_an_unknown_command_is_one_line(run):
    done = subprocess.run([run.scripts / 'mmaselect', 'slect'],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    choices = 'select, extract, train, test'
    assert done.stderr.startswith(f'error: mmaselect slect: there is no such command; choose from: {choices}')

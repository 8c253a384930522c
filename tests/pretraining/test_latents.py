"""Training in latents: what is kept, what is trained, and what is exported."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED_DATA, error_line, make_tiny, needs_exact_resume, run_tool, start_tool
from mmengine.registry import DefaultScope, init_default_scope
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mmaselect
from mmaselect.diffusion.latent import find_vae, load_vae
from mmaselect.diffusion.loading import Identity
from mmaselect.diffusion.noise import seeded_generator
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.pretraining import EpsilonPrediction, FlowMatching, LatentDataset
from mmaselect.pretraining.latents import checksum

TINY = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, sample_size=4,
            num_embeds_ada_norm=1)  # fmt: skip
RESIZE = [
    dict(type='LoadReadableImage'),
    dict(type='Resize', scale=(32, 32), interpolation='bicubic'),
    dict(type='PackInputs'),
]


@pytest.fixture(scope='module', autouse=True)
def scope():
    import mmpretrain.datasets  # noqa: F401

    init_default_scope('mmpretrain')
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp('vae'))


@pytest.fixture
def some(digits, tmp_path):
    """A copy of ten digits that a test may change."""
    for digit in range(10):
        folder = tmp_path / 'train' / str(digit)
        folder.mkdir(parents=True)
        shutil.copy(sorted((digits / f'train/{digit}').iterdir())[0], folder)
    return tmp_path


def folder_of(root, pipeline=RESIZE, **more):
    return dict(type='CustomDataset', data_root=str(root), data_prefix='train', pipeline=pipeline, **more)


def make(vae, root, **fields):
    fields = {'datasets': [folder_of(root)], 'cache': root / 'kept/latents.safetensors', 'batch_size': 4, **fields}
    return LatentDataset(vae, **fields)


def test_latents_are_standardised_and_mirrored(vae, some):
    data = make(vae, some)
    assert len(data) == 20
    values = torch.stack([data[index]['inputs'] for index in range(len(data))])
    assert values.shape == (20, 4, 4, 4)
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-5)
    content = load_file(data.cache)
    assert content['latents'].dtype == torch.float16
    std, mean = torch.std_mean(content['latents'].double(), (0, 2, 3), correction=0)
    torch.testing.assert_close((content['mean'], content['std']), (mean, std), rtol=1e-12, atol=0)
    # The encodings of the images and of their mirror images, which are not the mirrored encodings.
    encoder = load_vae(*find_vae(vae), Identity(), torch.float32)
    encoder.standardise(mean.tolist(), std.tolist())
    images = torch.stack([data.datasets[0][index]['inputs'].flip(0) / 127.5 - 1 for index in range(10)])
    with torch.no_grad():
        expected, mirrored = encoder(images), encoder(images.flip(-1))
        torch.testing.assert_close(data.encoder(images), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values[0::2], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(values[1::2], mirrored, rtol=2e-3, atol=2e-3)
    assert (mirrored - expected.flip(-1)).abs().max() > 0.1
    alone = make(vae, some, mirror=False, cache=some / 'alone.safetensors')
    assert torch.equal(alone.latents, data.latents[0::2])


def test_images_are_encoded_once(vae, some, monkeypatch):
    """Again only where encoder, files, transforms, seed or mirroring differ, or the file is damaged."""
    calls = []
    write = LatentDataset._write
    monkeypatch.setattr(LatentDataset, '_write', lambda self: (calls.append(1), write(self)))

    def encodes(vae=vae, **fields):
        calls.clear()
        data = make(vae, some, **fields)
        return bool(calls), data.latents

    fresh, first = encodes()
    assert fresh
    assert not encodes()[0]
    # Moved, it is the same data.
    shutil.copytree(some / 'train', some / 'elsewhere/train')
    assert not encodes(datasets=[folder_of(some / 'elsewhere')])[0]
    assert encodes(mirror=False)[0]
    assert encodes(seed=1)[0]
    assert encodes(datasets=[folder_of(some, [RESIZE[0], dict(RESIZE[1], scale=(40, 40)), RESIZE[2]])])[0]
    other = make_tiny(some / 'other', width=12)
    assert encodes(vae=other)[0]
    fresh, again = encodes()
    assert fresh
    assert torch.equal(again, first)
    file = some / 'kept/latents.safetensors'
    whole = file.read_bytes()
    for damaged in (whole[:-1000], whole[:-1] + bytes([whole[-1] ^ 1]), b'', b'nothing'):
        file.write_bytes(damaged)
        fresh, again = encodes()
        assert fresh
        assert torch.equal(again, first)
    (image,) = (some / 'train/3').iterdir()
    shutil.copy(next((some / 'train/8').iterdir()), image)
    assert encodes()[0]
    (some / 'train/3').rename(some / 'train/x')
    assert encodes()[0]
    assert [path.name for path in file.parent.iterdir()] == ['latents.safetensors']


def test_random_crops_are_those_of_the_seed(vae, some):
    pipeline = [RESIZE[0], dict(type='RandomResizedCrop', scale=32, crop_ratio_range=(0.2, 0.9)), RESIZE[2]]
    datasets = [folder_of(some), dict(type='RepeatDataset', times=3, dataset=folder_of(some, pipeline))]
    before = np.random.get_state()[1].copy()
    first = make(vae, some, datasets=datasets).latents
    # What else draws from these generators is not disturbed.
    assert np.array_equal(np.random.get_state()[1], before)
    (some / 'kept/latents.safetensors').unlink()
    np.random.seed(5)
    again = make(vae, some, datasets=datasets, batch_size=7).latents
    torch.testing.assert_close(again, first, rtol=0, atol=2e-3)
    assert len(first) == 2 * (10 + 30)
    crops = first[20::2].unflatten(0, (3, 10))
    assert all(not torch.equal(crops[0], crops[index]) for index in (1, 2))
    other = make(vae, some, datasets=datasets, seed=1).latents
    assert torch.equal(other[:20], first[:20])
    assert not torch.allclose(other[20:], first[20:], atol=0.01)


def test_an_interruption_leaves_nothing(vae, some, monkeypatch):
    from mmaselect.diffusion.latent import TinyEncoder

    raw, calls = TinyEncoder.raw, []

    def stop(self, images):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return raw(self, images)

    monkeypatch.setattr(TinyEncoder, 'raw', stop)
    with pytest.raises(KeyboardInterrupt):
        make(vae, some)
    assert not list((some / 'kept').glob('*'))


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(datasets=[]), r'datasets=\[\] is not valid: give a list of configs of data sets'),
        (dict(datasets='CUB'), "datasets='CUB' is not valid"),
        (dict(cache='latents.pt'), "cache='latents.pt' is not valid: give the name of a .safetensors file"),
        (dict(cache=None), 'cache=None is not valid'),
        (dict(mirror='yes'), "mirror='yes' is not valid"),
        (dict(seed=-1), 'seed=-1 is not valid'),
        (dict(batch_size=0), 'batch_size=0 is not valid'),
        (dict(pipelines=[[RESIZE[0]]]), r'datasets\[0\] gives no colour image as inputs: end its pipeline with Pack'),
        (
            dict(pipelines=[[RESIZE[0], dict(RESIZE[1], scale=(30, 32)), RESIZE[2]]]),
            r'datasets\[0\] gives images of \(32, 30\): let its pipeline resize or crop them to multiples of 8',
        ),
        (
            dict(pipelines=[RESIZE, [RESIZE[0], dict(RESIZE[1], scale=(40, 32)), RESIZE[2]]]),
            r'datasets give images of \(32, 32\) and of \(32, 40\): all must have one size',
        ),
    ],
)
def test_fields_that_cannot_be_used(vae, some, fields, message):
    if 'pipelines' in fields:
        fields = dict(datasets=[folder_of(some, pipeline) for pipeline in fields['pipelines']])
    with pytest.raises(InputError, match=message) as caught:
        make(vae, some, **fields)
    assert '\n' not in str(caught.value)


def test_a_model_of_other_channels():
    with pytest.raises(InputError, match='in_channels=4 does not fit data of 16 channels: give the channels of the'):
        FlowMatching(TINY)(torch.zeros(1, 16, 4, 4))


def test_epsilon_is_diffusers_own_ddpm(monkeypatch):
    from diffusers import DDPMScheduler

    fields = dict(beta_start=2e-4, beta_end=0.01, num_train_timesteps=500)
    model, scheduler = EpsilonPrediction(fields, transformer=TINY), DDPMScheduler(**fields)
    seen = {}

    def epsilon(latent, timestep, class_labels):
        seen.update(latent=latent, timestep=timestep)
        return type('Output', (), {'sample': torch.zeros_like(latent)})

    monkeypatch.setattr(model.transformer, 'forward', epsilon)
    data = torch.randn(64, 4, 4, 4)
    noise = torch.randn(data.shape, generator=seeded_generator(model.seed, int(model.step), 0))
    loss = model(data)['loss']
    # The target is the noise alone.
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-6)
    times = seen['timestep']
    assert times.min() >= 0
    assert 250 < times.max() < 500
    assert len(times.unique()) > 50
    bar = torch.cumprod(1 - torch.linspace(2e-4, 0.01, 500, dtype=torch.float64), 0)
    torch.testing.assert_close(model.scheduler.alphas_cumprod.double(), bar, rtol=1e-5, atol=0)
    alpha = bar[times].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen['latent'], alpha.sqrt() * data + (1 - alpha).sqrt() * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen['latent'], scheduler.add_noise(data, noise, times))


@pytest.mark.parametrize('objective', (FlowMatching, EpsilonPrediction))
def test_what_is_exported_loads_alone(vae, some, tmp_path, objective):
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    data = make(vae, some)
    scheduler = {'scheduler': dict(beta_end=0.01)} if objective is EpsilonPrediction else {}
    model = objective(transformer=TINY, **scheduler).eval()
    mmaselect.diffusion.loading.initialise(model.transformer, 0)
    model.export(tmp_path / 'export', data.encoder)
    frozen = mmaselect.load(dict(type=objective.family.name, pretrained=tmp_path / 'export'), 1, 'output')
    assert (frozen.multiple, frozen.image_size, frozen.num_blocks) == (16, 32, 2)
    images = torch.stack([data.datasets[0][index]['inputs'].flip(0) / 127.5 - 1 for index in range(4)])
    latent = frozen.encode(images)
    expected = torch.stack([data[2 * index]['inputs'] for index in range(4)])
    torch.testing.assert_close(latent, expected, rtol=2e-3, atol=2e-3)
    noise = torch.randn_like(latent)
    if objective is FlowMatching:
        noisy, time = 0.7 * latent + 0.3 * noise, torch.full((4,), 0.7)
        assert not (tmp_path / 'export/scheduler').exists()
    else:
        time = torch.full((4,), 300)
        stored = DDPMScheduler.from_pretrained(tmp_path / 'export', subfolder='scheduler')
        assert stored.config.beta_end == 0.01
        noisy = stored.add_noise(latent, noise, time)
        torch.testing.assert_close(frozen.family.process.alphas_cumprod, stored.alphas_cumprod.double())
    seen = []
    model.transformer.transformer_blocks[1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model.transformer(noisy, timestep=time, class_labels=torch.full((4,), 1))
    read = frozen(latent, noise, 300)[Tap(1, 'output')]
    torch.testing.assert_close(read.flatten(2).transpose(1, 2), seen[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def config(vae, digits, tmp_path):
    """The repository's config, in a space and on data that are small."""
    path = tmp_path / 'config.py'
    dataset = dict(
        _delete_=True, type='LatentDataset', vae=str(vae), cache=str(tmp_path / 'latents.safetensors'),
        datasets=[folder_of(digits)],
    )  # fmt: skip
    path.write_text(
        f"_base_ = ['{ROOT}/configs/pretrain/dit-latent-6b_cub-camvid-128px.py']\n"
        f'model = dict(transformer={TINY!r})\n'
        f'train_dataloader = dict(batch_size=8, dataset={dataset!r})\n'
        'train_cfg = dict(max_iters=40)\n'
        'default_hooks = dict(checkpoint=dict(interval=10), logger=dict(interval=1))\n'
    )
    return path


@needs_exact_resume
def test_a_run_that_was_killed_ends_as_one_that_was_not(config, tmp_path):
    def arguments(name):
        return ['pretrain.py', config, '--work-dir', tmp_path / name, '--out', tmp_path / name / 'out', '--resume']

    done = run_tool(*arguments('whole'))
    assert done.returncode == 0, done.stderr[-3000:]
    process = start_tool(*arguments('killed'))
    while not list((tmp_path / 'killed').glob('iter_*.pth')):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / 'killed/out').exists()
    done = run_tool(*arguments('killed'))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'Iter(train) [1/40]' not in done.stdout
    files = [tmp_path / name / 'out/transformer/diffusion_pytorch_model.safetensors' for name in ('whole', 'killed')]
    weights = [load_file(path) for path in files]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    # The averaged ones, of a training that went somewhere.
    checkpoint = torch.load(tmp_path / 'whole/iter_40.pth', weights_only=True)
    assert checkpoint['state_dict']['step'] == 40
    for name, value in weights[0].items():
        assert torch.equal(value, checkpoint['state_dict'][f'transformer.{name}'])
    last = checkpoint['ema_state_dict']['module.transformer.proj_out_2.weight']
    assert not torch.equal(weights[0]['proj_out_2.weight'], last)
    exported = tmp_path / 'whole/out'
    assert sorted(path.name for path in exported.iterdir()) == ['scheduler', 'transformer', 'vae']
    statistics = json.loads((exported / 'vae/config.json').read_text())
    with safe_open(tmp_path / 'latents.safetensors', 'pt') as file:
        for name in ('mean', 'std'):
            assert statistics[f'latents_{name}'] == pytest.approx(file.get_tensor(name).tolist(), rel=1e-6)
    frozen = mmaselect.load(dict(type='DiT', pretrained=exported), 0, 'query')
    assert frozen.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    'option,message',
    [
        ('train_dataloader.dataset.vae=/none', "vae='/none' is not a folder"),
        ('train_dataloader.dataset.datasets.0.data_root=/none', 'a data set cannot be built: '),
        ('model.transformer.in_channels=16', 'in_channels=16 does not fit data of 4 channels'),
        (
            'train_dataloader.dataset.mirrors=True',
            "field of LatentDataset='mirrors' is not known; choose from: vae, dat",
        ),
    ],
)
def test_the_tool_says_in_a_line_what_is_wrong(config, tmp_path, call_tool, option, message):
    done = call_tool('pretrain.py', config, '--work-dir', tmp_path / 'run', '--cfg-options', option)
    assert message in error_line(done)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason='needs ../shared/data')
def test_the_birds_in_the_space_of_flux(tmp_path):
    """Four birds: the statistics that data/README.md gives, roughly."""
    from mmengine.config import Config

    config = Config.fromfile(ROOT / 'configs/pretrain/sit-latent-6b_cub-camvid-128px.py').train_dataloader.dataset
    birds = config.datasets[0]
    birds.update(data_root=str(SHARED_DATA / 'CUB_200_2011_subset'), indices=4)
    data = LatentDataset(SHARED_DATA / 'taef2', [birds], tmp_path / 'latents.safetensors')
    assert data.latents.shape == (8, 32, 16, 16)
    content = load_file(tmp_path / 'latents.safetensors')
    assert content['mean'].abs().max() < 0.8
    assert ((content['std'] > 0.4) & (content['std'] < 1.5)).all()


def test_the_checksum_covers_the_statistics(vae, some):
    """A file whose mean was changed is made anew."""
    data = make(vae, some)
    content, key = load_file(data.cache), data.key
    whole = checksum(content)
    save_file({**content, 'mean': content['mean'] + 1}, data.cache, {'key': key, 'sha256': whole})
    assert torch.equal(make(vae, some).latents, data.latents)
    assert checksum(load_file(data.cache)) == whole

"""One file in the original layout: features are those of the diffusers folder, and no tensor too many is read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import originals
import pytest
import safetensors
import torch
from conftest import TINY, make_transformer
from safetensors.torch import save_file
from test_unet import PROMPT, SMALL, XL, make_network

from mmaselect.diffusion import single_file
from mmaselect.diffusion.conditioning import default_prompt_file, load_prompt, save_prompt
from mmaselect.diffusion.families import FAMILIES, SD3, Flux, UNet
from mmaselect.diffusion.loading import Source
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

UNET_TAP = next(tap for name, tap in UNet.tap_names(UNet.complete(SMALL)).items() if name == 'mid-vit-out')
#: Network in diffusers' layout, its architecture, its original layout, a tap.
CASES = {
    'SD3': (lambda: make_transformer('SD3'), TINY['SD3'], originals.sd3, Tap(1, 'query')),
    'SD3.5-medium': (lambda: make_transformer('SD3.5-medium'), TINY['SD3.5-medium'], originals.sd3, Tap(1, 'query')),
    'SD1.5': (lambda: make_network(SMALL), SMALL, lambda state: originals.unet(state, 1), UNET_TAP),
    'SDXL': (lambda: make_network(XL), XL, lambda state: originals.unet(state, 1), UNET_TAP),
}
PREFIX = 'model.diffusion_model.'


def small_vae(channels):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(32, 32, 64, 64), latent_channels=channels, layers_per_block=1,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4,
        scaling_factor=1.5305 if channels == 16 else 0.18215, shift_factor=0.0609 if channels == 16 else None,
    ).eval()  # fmt: skip


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Returns a function that saves a model as a diffusers folder and as one file with its VAE, once."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case.replace('.', '_'))
            network, arch, original, _ = CASES[case]
            network = network()
            vae = small_vae(arch.get('in_channels', 4))
            kind = 'unet' if case.startswith('SD1') or case == 'SDXL' else 'transformer'
            network.save_pretrained(folder / kind)
            vae.save_pretrained(folder / 'vae')
            if case == 'SDXL':
                config = json.loads((folder / 'vae/config.json').read_text())
                (folder / 'vae/config.json').write_text(json.dumps(dict(config, scaling_factor=0.13025)))
            tensors = {f'{PREFIX}{name}': value.contiguous() for name, value in original(network.state_dict()).items()}
            tensors |= {f'first_stage_model.{n}': v.contiguous() for n, v in originals.vae(vae.state_dict()).items()}
            tensors['text_encoders.guidance.attn2.joint_blocks.weight'] = torch.zeros(1)
            save_file(tensors, folder / 'model.safetensors')
            prompt = dict(prompt_embeds=torch.randn(1, 5, 32), pooled_prompt_embeds=torch.randn(1, 24))
            prompt = prompt if kind == 'transformer' else PROMPT
            for source in (folder, folder / 'model.safetensors'):
                save_prompt(default_prompt_file(Source(source)), prompt, '', 'tiny')
            made[case] = folder
        return made[case]

    return make


@pytest.fixture
def reads(monkeypatch):
    """Names of all tensors that are read."""
    names = []
    original = single_file.Tensors.get
    monkeypatch.setattr(single_file.Tensors, 'get', lambda self, name: names.append(name) or original(self, name))
    return names


def family_of(case):
    return 'SD3' if case.startswith('SD3') else 'UNet'


@pytest.mark.parametrize('case', CASES)
def test_features_are_those_of_the_folder(whole, reads, case):
    folder, (_, arch, _, tap) = whole(case), CASES[case]
    expected = DiffusionSpec(family_of(case), pretrained=folder).load([tap])
    reads.clear()
    model = DiffusionSpec(family_of(case), pretrained=folder / 'model.safetensors', arch=arch).load([tap])
    network = [name.removeprefix(PREFIX) for name in reads if name.startswith(PREFIX)]
    assert model.identity == expected.identity
    # Each tensor once, though query, key and value are parts of one, and none that does not run.
    assert len(reads) == len(set(reads))
    assert not [name for name in reads if 'decoder' in name or 'text_encoders' in name]
    unused = ('joint_blocks.2', 'joint_blocks.3', 'final_layer', 'output_blocks', 'out.')
    assert network
    assert not [name for name in network if name.startswith(unused)]
    state, there = model.family.transformer.state_dict(), expected.family.transformer.state_dict()
    assert set(state) == set(there)
    assert all(torch.equal(value, there[name]) for name, value in state.items())
    # No part keeps the tensor that it was cut out of.
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    latent = expected.encode(images)
    assert torch.equal(model.encode(images), latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    # In float64. Mapped tensors lie in memory as they do in their file, and by their alignment the processor's library
    # takes one kernel or another: a copy of the folder's own weights differs from them as much, by float32's rounding.
    one, other = (each.double()(latent.double(), noise.double(), 300)[tap] for each in (model, expected))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('case', ('SD3.5-medium', 'SD1.5'))
@pytest.mark.parametrize('form', ('bare', 'module', 'ckpt', 'diffusers'))
def test_other_forms(whole, tmp_path, case, form):
    """The network alone, its training's wrappers, a checkpoint of Lightning's, and diffusers' own layout."""
    folder, (network, arch, original, tap) = whole(case), CASES[case]
    state = {name: value.contiguous() for name, value in original(network().state_dict()).items()}
    if form == 'module':
        state = {f'module._orig_mod.{name}': value for name, value in state.items()}
    if form == 'diffusers':
        state = network().state_dict()
    if form == 'ckpt':
        file = tmp_path / 'one.ckpt'
        torch.save({'state_dict': {f'{PREFIX}{n}': v for n, v in state.items()}, 'global_step': 3}, file)
    else:
        file = tmp_path / 'one.safetensors'
        save_file(state, file)
    fields = dict(vae=folder, prompt=str(default_prompt_file(Source(folder))))
    model = DiffusionSpec(family_of(case), pretrained=file, arch=arch, **fields).load([tap])
    assert model.identity == DiffusionSpec(family_of(case), pretrained=folder).load([tap]).identity
    with pytest.raises(InputError, match=r"one\.\w+' has no vae/: name one with vae"):
        DiffusionSpec(family_of(case), pretrained=file, arch=arch)


class Shapes:
    """The file of a published model, of which there are only names and shapes."""

    def __init__(self, state, values=None):
        self.source = SimpleNamespace(field='pretrained', name='x.safetensors', single='x.safetensors')
        self._state, self.values = state, values or {}

    def names(self):
        return set(self._state)

    def shapes(self):
        return {name: list(value.shape) for name, value in self._state.items()}

    def get(self, name):
        return self.values[name]


PUBLISHED = [(family, name) for family in (SD3, UNet, Flux) for name in family.architectures]


@pytest.mark.parametrize('family,name', PUBLISHED, ids=[name for _, name in PUBLISHED])
def test_the_architecture_of_published_files_is_found(monkeypatch, family, name):
    config = family.complete(family.architectures[name])
    with torch.device('meta'):
        state = family._network(config).state_dict()
    layouts = {'SD3': originals.sd3, 'Flux': originals.flux, 'UNet': lambda state: originals.unet(state, 2)}
    file = Shapes(layouts[family.name](state))
    monkeypatch.setattr(single_file, 'open_single', lambda source: file)
    for families in ([family], list(FAMILIES.values())):
        assert single_file.infer_network(file.source, families, None) == (family, config)
    assert single_file.infer_network(file.source, [family], name) == (family, config)
    other = next(other for one, other in PUBLISHED if one is family and other != name)
    with pytest.raises(InputError, match=rf"is not of arch='{other}': tensor|is no original file of a"):
        single_file.infer_network(file.source, [family], other)


def test_flux_by_value():
    """diffusers' function knows FLUX's own width only: its biases stand for the rest."""
    config = Flux.complete(dict(num_layers=1, num_single_layers=1, guidance_embeds=True))
    generator = torch.Generator().manual_seed(0)
    expected = {
        name: torch.randn(value.shape, generator=generator) if value.dim() == 1 else value
        for name, value in Flux._network(config).state_dict().items()
    }
    biases = {name: value for name, value in originals.flux(expected).items() if not value.is_meta}
    file = Shapes(originals.flux(expected), biases)
    found = single_file.Converted(file, 'FluxTransformer2DModel', config, expected)
    assert found.names() == set(expected)
    assert found.shapes() == {name: tuple(value.shape) for name, value in expected.items()}
    known = [name for name, value in expected.items() if not value.is_meta]
    assert len(known) > 25
    assert all(torch.equal(found.get(name), expected[name]) for name in known)


@pytest.mark.parametrize('channels', (4, 16))
@pytest.mark.parametrize('form', ('original', 'diffusers', 'whole'))
def test_a_file_of_a_vae(tmp_path, model_folder, channels, form):
    vae = small_vae(channels)
    state = vae.state_dict() if form == 'diffusers' else originals.vae(vae.state_dict())
    prefix = 'first_stage_model.' if form == 'whole' else ''
    save_file({f'{prefix}{name}': value.contiguous() for name, value in state.items()}, tmp_path / 'vae.safetensors')
    variant = 'DiT' if channels == 4 else 'SD3'
    spec = DiffusionSpec(variant, pretrained=model_folder(variant), vae=tmp_path / 'vae.safetensors')
    assert (spec.factor, spec.multiple) == (8, 16)
    model = spec.load([Tap(1, 'query')])
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mode()
    expected = (raw - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(model.encode(images), expected, rtol=1e-6, atol=1e-6)


def test_the_scale_of_a_vae_is_that_of_the_family():
    assert UNet.latent_scale(UNet.complete(UNet.architectures['sd1.5'])) == (0.18215, 0)
    assert UNet.latent_scale(UNet.complete(UNet.architectures['sdxl'])) == (0.13025, 0)
    assert Flux.latent_scale({}) == (0.3611, 0.1159)


def test_a_vae_of_unknown_scale_is_refused(tmp_path):
    save_file(originals.vae(small_vae(4).state_dict()), tmp_path / 'vae.safetensors')
    arch = dict(
        num_layers=1, attention_head_dim=12, num_attention_heads=4, cross_attention_dim=48, sample_size=8,
        caption_channels=12, norm_num_groups=4,
    )  # fmt: skip
    spec = DiffusionSpec('PixArt', arch=arch, vae=tmp_path / 'vae.safetensors')
    with pytest.raises(
        InputError, match=r'does not say the scale of its latents, and that of this family is not known'
    ):
        spec.load([Tap(0, 'query')])


def test_what_is_refused(tmp_path, whole, model_folder):
    def refused(file, type='SD3', **fields):
        with pytest.raises(InputError) as error:
            DiffusionSpec(type, pretrained=file, **fields)
        assert '\n' not in str(error.value)
        return str(error.value)

    (tmp_path / 'flux1-dev-Q4_0.gguf').write_bytes(b'GGUF')
    assert 'is GGUF, which is quantised: give the unquantised model' in refused(tmp_path / 'flux1-dev-Q4_0.gguf')
    (tmp_path / 'readme.md').write_text('x')
    assert 'is not a file of weights: give one of .safetensors' in refused(tmp_path / 'readme.md')
    assert "'x/y.safetensors' is not a folder" in refused('x/y.safetensors')
    small = whole('SD3') / 'model.safetensors'
    line = refused(small)
    assert 'is none of the architectures sd3-medium, sd3.5-medium, sd3.5-large' in line
    assert 'is none of the architectures sd3-medium' in refused(small, 'auto')
    assert "arch='sd4' is not known; choose from: sd3-medium" in refused(small, arch='sd4')
    assert "is not of arch='sd3-medium': tensor" in refused(small, arch='sd3-medium')
    assert 'is none of the architectures sd1.5' in refused(small, 'UNet')
    assert 'is no original file of a FluxTransformer2DModel' in refused(small, 'Flux')
    assert 'diffusers does not convert original files of a PixArtTransformer2DModel' in refused(small, 'PixArt')
    assert 'arch is a dict of arguments: name the family' in refused(small, 'auto', arch=TINY['SD3'])
    both = dict(pretrained=model_folder('SD3'), arch='sd3-medium')
    with pytest.raises(InputError, match=r'give exactly one of them \(both only with a single file\)'):
        DiffusionSpec('SD3', **both)
    tensors = {f'{PREFIX}{name}': v for name, v in originals.sd3(make_transformer('SD3').state_dict()).items()}
    scaled = {**tensors, f'{PREFIX}joint_blocks.0.x_block.attn.qkv.scale_weight': torch.ones(1)}
    save_file({name: value.contiguous() for name, value in scaled.items()}, tmp_path / 'fp8.safetensors')
    for family in ('SD3', 'auto'):
        assert "is quantised (tensor 'joint_blocks.0.x_block.attn.qkv.scale_weight')" in refused(
            tmp_path / 'fp8.safetensors', family
        )
    dit = {'x_embedder.proj.weight': torch.ones(1), 'blocks.0.attn.qkv.weight': torch.ones(1)}
    save_file(dit, tmp_path / 'dit.safetensors')
    assert 'is an original DiT or SiT: convert it with `python tools/model_converters/' in refused(
        tmp_path / 'dit.safetensors', 'DiT'
    )


def test_each_file_has_a_prompt_of_its_own(whole, tmp_path):
    folder = whole('SD3')
    one, other = (default_prompt_file(Source(path)) for path in (folder, folder / 'model.safetensors'))
    assert (one.name, other.name) == ('prompt_embeds.safetensors', 'model.prompt_embeds.safetensors')
    assert one.parent == other.parent
    other.rename(tmp_path / 'away')
    try:
        with pytest.raises(InputError, match=r'encode_prompt.py DIFFUSERS_FOLDER .*model.prompt_embeds.safetensors`'):
            load_prompt(None, Source(folder / 'model.safetensors'), {'prompt_embeds': 32}, 333)
    finally:
        (tmp_path / 'away').rename(other)


def test_unread_tensors_stay_unread_in_a_pickle(whole, tmp_path, monkeypatch):
    """A .ckpt is mapped, not read: of its tensors only those that are asked for are copied."""
    from mmaselect.diffusion import loading

    folder = whole('SD3')
    with safetensors.safe_open(folder / 'model.safetensors', 'pt') as file:
        torch.save({'state_dict': {name: file.get_tensor(name) for name in file.keys()}}, tmp_path / 'a.ckpt')  # noqa: SIM118
    options = []
    original = torch.load
    monkeypatch.setattr(loading.torch, 'load', lambda *args, **kw: options.append(kw) or original(*args, **kw))
    fields = dict(arch=TINY['SD3'], prompt='zeros')
    model = DiffusionSpec('SD3', pretrained=tmp_path / 'a.ckpt', **fields).load([Tap(1, 'query')])
    assert all(kw['weights_only'] is True and kw['mmap'] is True for kw in options)
    expected = DiffusionSpec('SD3', pretrained=folder, prompt='zeros').load([Tap(1, 'query')])
    assert model.identity == expected.identity

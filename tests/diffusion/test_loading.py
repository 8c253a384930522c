"""Loading from diffusers folders: the right values, no tensor too many, and clear words for what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors
import torch
from conftest import TINY, family_of, make_transformer, make_vae, needs_torch, set_hub
from safetensors.torch import load_file, save_file

from mmaselect.diffusion import loading
from mmaselect.diffusion.latent import VAEEncoder, rename_attention
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

VARIANTS = ('SD3.5-medium', 'DiT', 'SiT')
QUERY = Tap(1, 'query')
FILE = 'transformer/diffusion_pytorch_model.safetensors'


def load(folder, variant='DiT', tap=QUERY, **fields):
    return DiffusionSpec(family_of(variant), pretrained=folder, **fields).load((tap,))


@pytest.fixture
def reads(monkeypatch):
    """Names of all tensors that are read."""
    names = []
    original = safetensors.safe_open

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            names.append(name)
            return self.file.get_tensor(name)

        def metadata(self):
            return self.file.metadata()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(safetensors, 'safe_open', Recorder)
    return names


@pytest.mark.parametrize('sharded', (False, True))
@pytest.mark.parametrize('variant', VARIANTS)
def test_only_what_runs_is_read(model_folder, reads, variant, sharded):
    model = load(model_folder(variant, sharded), variant)
    assert not [name for name in reads if name.startswith(('transformer_blocks.2', 'transformer_blocks.3'))]
    assert not [name for name in reads if name.startswith(('proj_out', 'norm_out', 'decoder', 'post_quant_conv'))]
    # In the last block, the query and what leads to it.
    attention = 'attn' if variant.startswith('SD3') else 'attn1'
    last = {name.split('.', 2)[2] for name in reads if name.startswith('transformer_blocks.1.')}
    # Norms are computed before the attention, the prompt's as well.
    assert {name for name in last if not name.startswith(('norm1.', 'norm1_context.'))} == {
        f'{attention}.to_q.weight',
        f'{attention}.to_q.bias',
    }
    assert len(reads) == len(set(reads))
    expected = make_transformer(variant).state_dict()
    for name, value in model.family.transformer.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_unneeded_shards_are_not_even_opened(model_folder, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(model_folder('DiT', sharded=True), folder)
    index = json.loads((folder / 'transformer/diffusion_pytorch_model.safetensors.index.json').read_text())
    needed = {shard for name, shard in index['weight_map'].items() if not name.startswith(('transformer_blocks.2',
              'transformer_blocks.3', 'proj_out'))}  # fmt: skip
    others = set(index['weight_map'].values()) - needed
    assert others
    for shard in others:
        (folder / 'transformer' / shard).unlink()
    load(folder)
    with pytest.raises(InputError, match=r'lacks its shard'):
        load(folder, tap=Tap(3, 'output'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_features_equal_those_of_the_pipeline_parts(model_folder, variant):
    """Image to query through our loader, against diffusers' VAE and a hook on diffusers' transformer."""
    from diffusers import AutoencoderKL
    from test_families import diffusers_maps

    folder = model_folder(variant)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    model = load(folder, variant, Tap(2, 'value'))
    vae = AutoencoderKL.from_pretrained(folder / 'vae')
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode()
    expected = (expected - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    latent = model.encode(images)
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)
    if variant.startswith('SD3'):
        import test_families

        prompt = load_file(folder / 'prompt_embeds.safetensors')
        test_families.PROMPT.update(prompt)
    noise = torch.randn(2, *latent.shape[1:])
    if variant == 'DiT':
        # The folder's own betas, 2e-4 to 1e-2.
        alpha = (1 - torch.linspace(2e-4, 1e-2, 1000)).cumprod(0)[300]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    else:
        noisy = 0.7 * latent + 0.3 * noise
    actual = model(latent, noise, 300)[Tap(2, 'value')]
    torch.testing.assert_close(actual, diffusers_maps(variant, noisy, 300, 2)['value'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_narrowing_gives_the_model_that_was_never_wider(model_folder, variant):
    """Also when it is done step by step, which is what a search over given candidates does."""
    spec = DiffusionSpec(family_of(variant), pretrained=model_folder(variant))
    everything = [tap for taps in spec.alternatives('auto', 'auto') for tap in taps]
    latent = torch.randn(2, TINY[variant]['in_channels'], 8, 8)
    for steps in (
        [[Tap(3, 'output'), Tap(1, 'value')], [Tap(1, 'value')]],
        [[Tap(2, 'attention'), Tap(2, 'key')], [Tap(2, 'key')]],
        [[Tap(0, 'query')]],
    ):
        model = spec.load(everything)
        wide = model(latent, torch.ones_like(latent), 300)
        for taps in steps:
            model.narrow(taps)
            fresh = spec.load(taps)
            assert model.identity == fresh.identity
            assert set(model.state_dict()) == set(fresh.state_dict())
            maps = model(latent, torch.ones_like(latent), 300)
            assert set(maps) == set(taps)
            for tap in taps:
                torch.testing.assert_close(maps[tap], wide[tap])
    with pytest.raises(InputError, match=r"block=3, component='query' was not loaded: this model reads query of block"):
        model.narrow([Tap(3, 'query')])


def test_identity_names_the_weights_and_nothing_else(model_folder, tmp_path):
    folder = model_folder('DiT')
    identity = load(folder).identity
    assert len(identity) == 32
    assert load(folder).identity == identity
    assert load(folder, dtype='bfloat16').identity == identity
    assert load(model_folder('DiT', sharded=True)).identity == identity
    assert load(folder, tap=Tap(2, 'query')).identity != identity
    shutil.copytree(folder, tmp_path / 'copy')
    tensors = load_file(tmp_path / 'copy' / FILE)
    tensors['transformer_blocks.1.attn1.to_q.weight'][0, 0] += 1e-3
    save_file(tensors, tmp_path / 'copy' / FILE)
    assert load(tmp_path / 'copy').identity != identity


@pytest.mark.parametrize('dtype', ('bfloat16', pytest.param('float16', marks=needs_torch('2.6', 'float16 on a CPU'))))
def test_half_precision_stays_close(model_folder, dtype):
    folder = model_folder('SiT')
    latent, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    exact = load(folder, 'SiT')(latent, noise, 200)[Tap(1, 'query')]
    model = load(folder, 'SiT', dtype=dtype)
    half = model(latent, noise, 200)[Tap(1, 'query')]
    assert half.dtype == getattr(torch, dtype)
    error = (half.float() - exact).norm() / exact.norm()
    # 8 bits of mantissa give a relative step of 2^-8, 11 bits of 2^-11; a few layers add up.
    assert error < {'bfloat16': 0.02, 'float16': 0.0025}[dtype]


def test_frozen_means_frozen(model_folder):
    model = load(model_folder('DiT'))
    model.train()
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize('variant', VARIANTS)
def test_random_models_have_the_position_table_of_diffusers(variant, monkeypatch):
    """A buffer that a checkpoint would hold must not be what happens to lie in memory."""
    real = torch.nn.Module.to_empty

    def to_garbage(self, **fields):
        module = real(self, **fields)
        for buffer in module.buffers():
            buffer.fill_(torch.nan)
        return module

    monkeypatch.setattr(torch.nn.Module, 'to_empty', to_garbage)
    arch = dict(TINY[variant], in_channels=3)
    model = DiffusionSpec(family_of(variant), arch=arch, latent='pixels').load((QUERY,))
    expected = make_transformer(variant).pos_embed.pos_embed
    assert torch.equal(model.family.transformer.pos_embed.pos_embed, expected)
    latent = torch.randn(1, 3, 16, 16)
    assert torch.isfinite(model(latent, torch.zeros_like(latent), 0.0)[QUERY]).all()


def test_random_weights_are_reproducible_and_pruning_does_not_change_them():
    arch = dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3)
    make = lambda block, seed: DiffusionSpec('SiT', arch=arch, latent='pixels', seed=seed).load((Tap(block, 'query'),))  # noqa: E731
    one, two = make(1, 0).family.transformer.state_dict(), make(2, 0).family.transformer.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert make(1, 0).identity == make(1, 0).identity
    assert make(1, 0).identity != make(1, 1).identity


def test_vae_files_of_old_diffusers_versions_load():
    assert rename_attention('encoder.mid_block.attentions.0.query.weight') == (
        'encoder.mid_block.attentions.0.to_q.weight'
    )
    assert rename_attention('encoder.mid_block.attentions.0.proj_attn.bias') == (
        'encoder.mid_block.attentions.0.to_out.0.bias'
    )
    assert rename_attention('encoder.conv_in.weight') == 'encoder.conv_in.weight'
    names = set(VAEEncoder(dict(make_vae(4).config)).state_dict())
    assert 'encoder.mid_block.attentions.0.to_out.0.weight' in names
    assert not [name for name in names if 'decoder' in name or 'post_quant' in name]


def test_an_old_vae_gives_the_same_latents(model_folder, tmp_path):
    shutil.copytree(model_folder('DiT'), tmp_path / 'copy')
    path = tmp_path / 'copy/vae/diffusion_pytorch_model.safetensors'
    old = {}
    for name, value in load_file(path).items():
        if '.attentions.' in name:
            for new, before in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')):
                name = name.replace(f'.{new}.', f'.{before}.')
            if name.endswith('weight') and value.dim() == 2:
                value = value[:, :, None, None]
        old[name] = value
    save_file(old, path)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / 'copy').encode(images), load(model_folder('DiT')).encode(images))


@pytest.fixture
def broken(model_folder, tmp_path):
    """A copy of the DiT folder, to be damaged."""
    shutil.copytree(model_folder('DiT'), tmp_path / 'model')
    return tmp_path / 'model'


def test_a_folder_that_is_missing():
    with pytest.raises(InputError, match=r"pretrained='/no/such' is not a folder \(a diffusers model folder or a hub"):
        load('/no/such')


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    set_hub(monkeypatch, HF_HUB_OFFLINE=True)
    with pytest.raises(InputError, match=r"pretrained='nobody/nothing' is neither a folder here nor to be had"):
        load('nobody/nothing')


@pytest.mark.parametrize('sharded', (False, True))
def test_a_hub_model_in_the_cache_needs_no_network(model_folder, tmp_path, monkeypatch, sharded):
    """A cluster's nodes: HF_HUB_OFFLINE, everything fetched before. Files that a model never had are no error."""
    set_hub(monkeypatch, HF_HUB_OFFLINE=True, HF_HUB_CACHE=str(tmp_path))
    commit = '0123456789' * 4
    shutil.copytree(model_folder('DiT', sharded), tmp_path / 'models--me--dit' / 'snapshots' / commit)
    shutil.copytree(model_folder('DiT') / 'vae', tmp_path / 'models--me--vae' / 'snapshots' / commit)
    for name in ('dit', 'vae'):
        (tmp_path / f'models--me--{name}' / 'refs').mkdir()
        (tmp_path / f'models--me--{name}' / 'refs' / 'main').write_text(commit)
    identity = load(model_folder('DiT')).identity
    assert load('me/dit').identity == identity
    assert load('me/dit', vae='me/vae').identity == identity


def test_a_folder_of_another_family(model_folder):
    with pytest.raises(InputError, match=r"holds a 'DiTTransformer2DModel', which is not of family SD3"):
        load(model_folder('DiT'), 'SD3')
    with pytest.raises(InputError, match=r"holds a 'SD3Transformer2DModel', which is not of family DiT"):
        load(model_folder('SD3'), 'DiT')


def test_a_truncated_file(broken):
    content = (broken / FILE).read_bytes()
    (broken / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r'diffusion_pytorch_model.safetensors is not a readable safetensors file'):
        load(broken)


def test_a_missing_tensor(broken):
    tensors = load_file(broken / FILE)
    del tensors['transformer_blocks.0.attn1.to_k.bias']
    save_file(tensors, broken / FILE)
    with pytest.raises(
        InputError, match=r"lacks 1 of \d+ tensors, the first is 'transformer_blocks.0.attn1.to_k.bias'"
    ):
        load(broken)


def test_a_tensor_of_another_shape(broken):
    tensors = load_file(broken / FILE)
    tensors['pos_embed.proj.bias'] = torch.zeros(7)
    save_file(tensors, broken / FILE)
    with pytest.raises(InputError, match=r"tensor 'pos_embed.proj.bias' is \(7,\), expected \(64,\)"):
        load(broken)


BIN = FILE.replace('.safetensors', '.bin')


@pytest.mark.parametrize('form', ('zip', 'legacy', 'sharded'))
def test_bin_weights(broken, model_folder, reads, monkeypatch, form):
    """As ``facebook/DiT-XL-2-256`` has them; of a zip file and of shards only what runs is read."""
    tensors = load_file(broken / FILE)
    (broken / FILE).unlink()
    if form == 'sharded':
        shards = {name: f'diffusion_pytorch_model-{index % 3}.bin' for index, name in enumerate(tensors)}
        for shard in set(shards.values()):
            torch.save({n: t for n, t in tensors.items() if shards[n] == shard}, broken / 'transformer' / shard)
        index = broken / f'{BIN}.index.json'
        index.write_text(json.dumps({'weight_map': shards}))
    else:
        torch.save(tensors, broken / BIN, _use_new_zipfile_serialization=form == 'zip')
    taken = []
    original = loading.Pickled.get_tensor
    monkeypatch.setattr(loading.Pickled, 'get_tensor', lambda self, n: taken.append(n) or original(self, n))
    identity = load(broken).identity
    expected = load(model_folder('DiT'))
    assert identity == expected.identity
    assert sorted(taken) == sorted(expected.family.transformer.state_dict())


def test_safetensors_go_before_bin(broken, model_folder):
    (broken / BIN).write_bytes(b'no weights')
    assert load(broken).identity == load(model_folder('DiT')).identity


def test_a_bin_file_that_is_none(broken):
    (broken / FILE).rename(broken / BIN)
    with pytest.raises(InputError, match=r'model\.bin is not readable as weights: it is no file of tensors'):
        load(broken)
    torch.save([torch.zeros(3)], broken / BIN)
    with pytest.raises(InputError, match=r'model\.bin holds a list, not tensors by name'):
        load(broken)
    (broken / BIN).unlink()
    with pytest.raises(InputError, match=r'has no transformer/diffusion_pytorch_model.safetensors or .bin$'):
        load(broken)


def test_a_variant_is_taken_part_by_part(broken, model_folder, caplog):
    """The VAE has none of it, the transformer has nothing else."""
    tensors = {name: value.half() for name, value in load_file(broken / FILE).items()}
    (broken / FILE).unlink()
    save_file(tensors, broken / FILE.replace('.safetensors', '.fp16.safetensors'))
    model = DiffusionSpec('DiT', pretrained=broken, variant='fp16').load((QUERY,))
    name = 'transformer_blocks.1.attn1.to_q.weight'
    assert torch.equal(model.family.transformer.state_dict()[name], tensors[name].float())
    assert "has no variant 'fp16' in vae: the plain file is read" in caplog.text
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.encode(images), load(model_folder('DiT')).encode(images))
    spec = DiffusionSpec('DiT', pretrained=broken, variant='fp16', vae=model_folder('DiT'))
    assert spec.load((QUERY,)).identity == model.identity


@pytest.mark.parametrize('subfolder', (None, 'transformer', 'deep/transformer', 'deep'))
def test_a_network_alone(broken, model_folder, subfolder, tmp_path):
    """Its own folder, or a pipeline of which only it is named; what is beside it is found all the same."""
    identity = load(model_folder('DiT')).identity
    if subfolder is None:
        assert load(broken / 'transformer', vae=broken).identity == identity
        assert load(broken / FILE, vae=broken / 'vae/diffusion_pytorch_model.safetensors').identity == identity
        with pytest.raises(InputError, match=r"has no vae/: name one with vae='...'"):
            load(broken / 'transformer')
    else:
        if subfolder.startswith('deep'):
            shutil.copytree(broken, tmp_path / 'outer/deep')
            broken = tmp_path / 'outer'
        model = load(broken, subfolder=subfolder)
        assert model.identity == identity
        # The scheduler's betas as well.
        assert model.family.process.alphas_cumprod[-1] == load(model_folder('DiT')).family.process.alphas_cumprod[-1]


def test_the_family_is_found(broken, model_folder):
    assert DiffusionSpec('auto', pretrained=model_folder('SD3.5-medium')).family.name == 'SD3'
    with pytest.raises(InputError, match=r"type='auto': .*'DiTTransformer2DModel', which does not tell its family"):
        DiffusionSpec('auto', pretrained=broken)
    (broken / 'model_index.json').write_text(json.dumps({'_class_name': 'DiTPipeline'}))
    assert DiffusionSpec('auto', pretrained=broken).family.name == 'DiT'
    config = json.loads((broken / 'transformer/config.json').read_text())
    (broken / 'transformer/config.json').write_text(json.dumps(dict(config, path_type='Linear')))
    assert DiffusionSpec('auto', pretrained=broken).family.name == 'SiT'
    with pytest.raises(InputError, match=r"type='auto' needs pretrained"):
        DiffusionSpec('auto', arch='dit-s/2-256')
    with pytest.raises(InputError, match=r'has no transformer/config.json or unet/config.json$'):
        DiffusionSpec('auto', pretrained=broken / 'vae' / '..' / 'scheduler')


@pytest.mark.parametrize(
    'change,named',
    [
        ({'transformer_blocks.0.attn1.to_q.weight_scale': torch.ones(1)}, r"tensor '.*to_q.weight_scale'"),
        ({'transformer_blocks.0.attn1.to_q.weight.absmax': torch.ones(4)}, r"tensor '.*to_q.weight.absmax'"),
        ({'transformer_blocks.0.attn1.to_q.weight': torch.ones(64, 64, dtype=torch.int8)}, r'.*weight. of torch.int8'),
    ],
)  # fmt: skip
def test_quantised_weights_are_refused(broken, change, named):
    save_file({**load_file(broken / FILE), **change}, broken / FILE)
    with pytest.raises(InputError, match=rf'is quantised \({named}\): .* give the unquantised model'):
        load(broken)


def test_a_quantised_config_is_refused(broken):
    file = broken / 'transformer/config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'quantization_config': {'quant_method': 'torchao'}}))
    with pytest.raises(InputError, match=r'is quantised \(its config.json has a quantization_config\)'):
        load(broken)


def test_weights_that_were_only_stored_in_8_bits_are_read(broken):
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(broken / FILE).items()}
    save_file(tensors, broken / FILE)
    found = load(broken).family.transformer.state_dict()
    assert all(torch.equal(value, tensors[name].float()) for name, value in found.items())


def test_the_frequencies_of_the_timestep_are_a_field(broken):
    shifted = load(broken, timestep_freq_shift=0)
    assert shifted.family.transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift == 0
    file = broken / 'transformer/config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'timestep_freq_shift': 0}))
    latent, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    one, other = (model(latent, noise, 250)[QUERY] for model in (shifted, load(broken)))
    assert torch.equal(one, other)
    assert not torch.allclose(one, load(broken, timestep_freq_shift=1)(latent, noise, 250)[QUERY], atol=1e-3)
    with pytest.raises(InputError, match=r'timestep_freq_shift=0 is not valid for SD3'):
        DiffusionSpec('SD3', arch='sd3-medium', timestep_freq_shift=0)
    with pytest.raises(InputError, match=r'timestep_freq_shift=2 is not known; choose from: 0, 1'):
        load(broken, timestep_freq_shift=2)


def test_an_index_that_walks_out_of_its_folder(model_folder, tmp_path):
    shutil.copytree(model_folder('DiT', sharded=True), tmp_path / 'model')
    path = tmp_path / 'model/transformer/diffusion_pytorch_model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map'] = dict.fromkeys(index['weight_map'], '../../secret.safetensors')
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"shard '../../secret.safetensors' is not the name of a safetensors file"):
        load(tmp_path / 'model')


def test_a_config_that_is_not_json(broken):
    (broken / 'transformer/config.json').write_text('{"num_layers": ')
    with pytest.raises(InputError, match=r'config.json is not valid JSON'):
        load(broken)


def test_a_folder_without_a_vae(broken):
    shutil.rmtree(broken / 'vae')
    with pytest.raises(InputError, match=r"has no vae/: name one with vae='...', or set latent='pixels'"):
        load(broken)


def test_a_vae_of_its_own(broken, model_folder, tmp_path):
    shutil.move(broken / 'vae', tmp_path / 'my-vae')
    model = load(broken, vae=tmp_path / 'my-vae')
    assert model.identity == load(model_folder('DiT')).identity
    with pytest.raises(InputError, match=r'the latent has 16 channels; DiT expects 4'):
        load(broken, vae=model_folder('SD3'))


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(type='Imagen'), "diffusion.type='Imagen' is not known; choose from: SD3, DiT, SiT"),
        (dict(type='DiT'), 'pretrained=None, arch=None: give exactly one of them'),
        (dict(type='DiT', arch='huge'), "arch='huge' is not known; choose from: dit-s/2-256"),
        (dict(type='DiT', arch='dit-s/2-256', dtype='int8'), "dtype='int8' is not known; choose from: float32"),
        (dict(type='DiT', arch='dit-s/2-256', latent='jpeg'), "latent='jpeg' is not known; choose from: auto, vae"),
        (dict(type='DiT', arch='dit-s/2-256', sigma=1), "field of diffusion='sigma' is not known; choose from: type"),
        (dict(arch='dit-s/2-256'), 'diffusion has no type; choose from: SD3, DiT, SiT'),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        DiffusionSpec.from_dict(fields)


@pytest.mark.parametrize(
    'fields,message',
    [
        (dict(type='DiT', shift=3.0), 'shift=3.0 is not valid for DiT'),
        (dict(type='SiT', shift=-1), 'shift=-1 is not valid: give a number above 0'),
        (dict(type='SiT', prompt='zeros'), "prompt='zeros': SiT is class-conditional and takes no prompt"),
    ],
)
def test_fields_that_do_not_fit_the_family(fields, message):
    arch = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8, in_channels=3)
    with pytest.raises(InputError, match=message):
        DiffusionSpec(arch=arch, latent='pixels', **fields).load((Tap(0, 'query'),))

"""tools/model_converters/dit_to_diffusers.py against an independent DiT in the original layout."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import error_line, run_tool
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mmaselect.diffusion.families import DiT, SiT
from mmaselect.diffusion.loading import initialise
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap

WIDTH, HEADS, DEPTH, PATCH, SIDE, CLASSES = 48, 4, 3, 2, 8, 10


class Block(nn.Module):
    """A DiT block as in figure 3 of arXiv 2212.09748, with the tensor names of the published checkpoints."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({'qkv': nn.Linear(WIDTH, 3 * WIDTH), 'proj': nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(WIDTH, 4 * WIDTH), 'fc2': nn.Linear(4 * WIDTH, WIDTH)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        h = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale_a) + shift_a
        self.query, key, value = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.attn['qkv'](h).chunk(3, dim=2)
        )
        weights = (self.query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        x = x + gate_a * self.attn['proj']((weights @ value).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp['fc2'](F.gelu(self.mlp['fc1'](h), approximate='tanh'))


class Original(nn.Module):
    """The published network: one timestep and one class embedder for all blocks, frequencies spaced over 128 steps."""

    def __init__(self):
        super().__init__()
        self.x_embedder = nn.ModuleDict({'proj': nn.Conv2d(4, WIDTH, PATCH, PATCH)})
        self.t_embedder = nn.ModuleDict(
            {'mlp': nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))}
        )
        self.y_embedder = nn.ModuleDict({'embedding_table': nn.Embedding(CLASSES + 1, WIDTH)})
        cells = SIDE // PATCH
        position = torch.arange(cells).float()
        frequencies = 1e4 ** -(torch.arange(WIDTH // 4) / (WIDTH / 4))

        def wave(values):
            angles = values[:, None] * frequencies
            return torch.cat([angles.sin(), angles.cos()], 1)

        # Columns first: the published tables put the horizontal position into the first half of the channels.
        table = torch.cat([wave(position.repeat(cells)), wave(position.repeat_interleave(cells))], 1)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.final_layer = nn.ModuleDict(
            {
                'adaLN_modulation': nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH)),
                'linear': nn.Linear(WIDTH, PATCH * PATCH * 8),
            }
        )

    def forward(self, x, t, y):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None].float() * frequencies
        c = self.t_embedder['mlp'](torch.cat([angles.cos(), angles.sin()], 1)) + self.y_embedder['embedding_table'](y)
        x = self.x_embedder['proj'](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer['adaLN_modulation'](c)[:, None].chunk(2, dim=2)
        x = self.final_layer['linear'](F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
        cells = SIDE // PATCH
        return x.view(-1, cells, cells, PATCH, PATCH, 8).permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, SIDE, SIDE)


@pytest.fixture(scope='module')
def original():
    model = Original()
    table = model.pos_embed.data.clone()
    initialise(model, 0)
    model.pos_embed.data = table
    return model.eval()


@pytest.fixture(scope='module')
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp('converter')
    torch.save(original.state_dict(), folder / 'original.pt')
    done = run_tool('model_converters/dit_to_diffusers.py', folder / 'original.pt', folder / 'out', '--heads', HEADS)
    assert done.returncode == 0, done.stderr
    assert '3 blocks, 4 heads' in done.stdout
    return folder / 'out'


LATENT = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_the_whole_network_gives_equal_outputs(original, converted):
    config = json.loads((converted / 'transformer/config.json').read_text())
    assert (config['norm_eps'], config['timestep_freq_shift']) == (1e-6, 0)
    model = DiT.build(DiT.complete(config)).eval()
    model.load_state_dict(load_file(converted / 'transformer/diffusion_pytorch_model.safetensors'))
    labels = torch.tensor([3, CLASSES])
    for time in (0, 7, 999):
        with torch.no_grad():
            expected = original(LATENT, torch.tensor([time, time]), labels)
            actual = model(LATENT, timestep=torch.tensor([time, time]), class_labels=labels).sample
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('family,timestep,time', [('DiT', 420, 420), ('SiT', 420, 0.58)])
def test_the_backbone_reads_the_queries_of_the_original(original, converted, model_folder, family, timestep, time):
    """A SiT is told 1 - t / 1000, which the original calls time."""
    tap = Tap(1, 'query')
    model = DiffusionSpec(family, pretrained=converted, vae=model_folder('DiT')).load((tap,))
    with torch.no_grad():
        original(LATENT, torch.full((2,), time), torch.full((2,), CLASSES))
        expected = original.blocks[1].query.transpose(2, 3).flatten(1, 2)
        actual = model.family(LATENT, timestep)[tap].flatten(2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_training_checkpoints_give_their_average(original, tmp_path):
    average = {name: 2 * value if name != 'pos_embed' else value for name, value in original.state_dict().items()}
    content = dict(model=original.state_dict(), ema=average, opt={}, args=argparse.Namespace(lr=1))
    torch.save(content, tmp_path / 'train.pt')
    done = run_tool('model_converters/dit_to_diffusers.py', tmp_path / 'train.pt', tmp_path / 'out', '--heads', HEADS)
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / 'out/transformer/diffusion_pytorch_model.safetensors')
    assert torch.equal(tensors['proj_out_2.bias'], average['final_layer.linear.bias'])


def test_time_that_runs_the_other_way(original, tmp_path, model_folder):
    """REPA calls data time 0, and adds heads for its training."""
    state = {**original.state_dict(), 'projectors.0.0.weight': torch.ones(3, 3), 'projectors.0.0.bias': torch.ones(3)}
    content = dict(ema=state, args=argparse.Namespace(path_type='linear', num_classes=CLASSES))
    torch.save(content, tmp_path / 'repa.pt')
    done = run_tool('model_converters/dit_to_diffusers.py', tmp_path / 'repa.pt', tmp_path / 'out', '--heads', HEADS)
    assert done.returncode == 0, done.stderr
    assert '4 heads, REPA, data_time=0, path_type=Linear' in done.stdout
    config = json.loads((tmp_path / 'out/transformer/config.json').read_text())
    assert (config['data_time'], config['path_type']) == (0, 'Linear')
    tap = Tap(1, 'query')
    # The config says that it is a SiT, too.
    spec = DiffusionSpec('auto', pretrained=tmp_path / 'out', vae=model_folder('DiT'))
    assert spec.family is SiT
    with torch.no_grad():
        original(LATENT, torch.full((2,), 0.42), torch.full((2,), CLASSES))
        expected = original.blocks[1].query.transpose(2, 3).flatten(1, 2)
        actual = spec.load((tap,)).family(LATENT, 420)[tap].flatten(2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'heads,flags,stored,expected',
    [
        ({}, [], {}, {}),
        ({'ap_head.0.weight': torch.ones(2, 2)}, [], {}, dict(data_time=0)),
        ({'projectors.0.weight': torch.ones(2, 2)}, ['--data-time', '1'], {}, dict(data_time=1)),
        ({}, ['--data-time', '0', '--path-type', 'cosine'], {}, dict(data_time=0, path_type='GVP')),
        ({}, [], dict(path_type='VP'), dict(path_type='VP')),
        ({}, ['--path-type', 'Linear'], dict(path_type='VP'), dict(path_type='Linear')),
    ],
)
def test_what_the_config_says_of_time_and_path(original, tmp_path, call_tool, heads, flags, stored, expected):
    content = dict(model={**original.state_dict(), **heads}, args=argparse.Namespace(**stored))
    torch.save(content, tmp_path / 'c.pt')
    arguments = [tmp_path / 'c.pt', tmp_path / 'out', '--heads', HEADS, *flags]
    assert call_tool('model_converters/dit_to_diffusers.py', *arguments).returncode == 0
    config = json.loads((tmp_path / 'out/transformer/config.json').read_text())
    assert {name: config[name] for name in ('data_time', 'path_type') if name in config} == expected


def test_wrappers_and_half_precision(original, tmp_path, call_tool):
    state = original.state_dict()
    for number, (content, dtype) in enumerate(
        [
            ({f'module.{name}': value for name, value in state.items()}, torch.float16),
            ({'state_dict': {f'module._orig_mod.{name}': value for name, value in state.items()}}, torch.bfloat16),
            ({'ema_model': state, 'model': {name: value + 1 for name, value in state.items()}}, torch.float32),
            (
                {f'{kind}.{name}': value + add for kind, add in (('ema_model', 0), ('online_model', 1))
                 for name, value in state.items()},
                torch.float32,
            ),
        ]
    ):  # fmt: skip
        cast = lambda value: {k: cast(v) for k, v in value.items()} if isinstance(value, dict) else value.to(dtype)  # noqa: B023, E731
        torch.save(cast(content), tmp_path / 'c.pt')
        out = tmp_path / str(number)
        done = call_tool('model_converters/dit_to_diffusers.py', tmp_path / 'c.pt', out, '--heads', HEADS)
        assert done.returncode == 0, done.stderr
        tensors = load_file(out / 'transformer/diffusion_pytorch_model.safetensors')
        expected = state['blocks.1.mlp.fc1.weight'].to(dtype).float()
        assert torch.equal(tensors['transformer_blocks.1.ff.net.0.proj.weight'], expected)


def test_a_table_of_classes_without_a_null_row(original, tmp_path, call_tool):
    state = original.state_dict()
    name = 'y_embedder.embedding_table.weight'
    state = {**state, name: state[name][:CLASSES]}
    torch.save(dict(ema=state, args=argparse.Namespace(num_classes=CLASSES)), tmp_path / 'c.pt')
    arguments = ['model_converters/dit_to_diffusers.py', tmp_path / 'c.pt', tmp_path / 'out', '--heads', HEADS]
    line = error_line(call_tool(*arguments))
    assert 'has 10 rows for 10 classes and was trained without a null class: give --null-class zero or' in line
    assert 'num_classes=7 does not fit a table of 10 classes' in error_line(call_tool(*arguments, '--num-classes', 7))
    for null, expected in (('zero', torch.zeros(WIDTH)), ('mean', state[name].mean(0))):
        arguments[2] = tmp_path / null
        assert call_tool(*arguments, '--null-class', null).returncode == 0
        config = json.loads((tmp_path / null / 'transformer/config.json').read_text())
        assert config['num_embeds_ada_norm'] == CLASSES
        tensors = load_file(tmp_path / null / 'transformer/diffusion_pytorch_model.safetensors')
        table = tensors['transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight']
        assert torch.equal(table[:CLASSES], state[name])
        torch.testing.assert_close(table[CLASSES], expected)


def test_networks_that_are_no_dit(original, tmp_path, call_tool):
    def convert(content):
        torch.save(content, tmp_path / 'c.pt')
        return error_line(
            call_tool('model_converters/dit_to_diffusers.py', tmp_path / 'c.pt', tmp_path / 'out', '--heads', HEADS)
        )

    state = original.state_dict()
    for name, said in (
        ('feat_rope.freqs_cos', 'a rotary position embedding, as LightningDiT has'),
        ('blocks.0.mlp.w12.weight', 'a SwiGLU, as LightningDiT has'),
        ('blocks.0.attn.q_norm.weight', 'a norm of query or key, as LightningDiT has'),
        ('bn.running_mean', 'a normalisation of the latents, as REPA-E has'),
    ):
        line = convert({**state, name: torch.ones(2)})
        assert f"checkpoint has '{name}', {said}: there is no family for it yet" in line
    assert 'c.pt holds a list, not tensors by name' in convert([state])
    assert 'c.pt holds a dict, not tensors by name' in convert({'ema': {}, 'epoch': 3})
    name = 'blocks.0.mlp.fc1.weight'
    line = convert({**state, name: torch.ones(4 * WIDTH, WIDTH, dtype=torch.int8)})
    assert f"checkpoint is quantised ('{name}' is torch.int8): give the unquantised one" in line
    assert "path_type='spiral' of the checkpoint is not known; choose from: Linear" in convert(
        dict(model=state, args=argparse.Namespace(path_type='spiral'))
    )
    assert 'it would run pathlib.' in convert({**state, 'extra': Path('a')})


def test_what_is_no_such_checkpoint(original, tmp_path, call_tool):
    def convert(tensors, *more):
        torch.save(tensors, tmp_path / 'c.pt')
        return error_line(call_tool('model_converters/dit_to_diffusers.py', tmp_path / 'c.pt', tmp_path / 'out', *more))

    state = original.state_dict()
    assert "checkpoint has no tensor 'pos_embed'" in convert({k: v for k, v in state.items() if k != 'pos_embed'})
    assert 'heads=None does not fit a width of 48: give --heads' in convert(state)
    assert "checkpoint has a tensor 'blocks.0.attn.gate.weight' that" in convert(
        {**state, 'blocks.0.attn.gate.weight': torch.ones(1)}, '--heads', '4'
    )
    assert 'is not the sine-cosine one of DiT' in convert(
        {**state, 'pos_embed': state['pos_embed'] + 1}, '--heads', '4'
    )
    assert 'does not fit: Missing key(s)' in convert(
        {k: v for k, v in state.items() if k != 'blocks.0.mlp.fc1.bias'}, '--heads', '4'
    )
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'code.pt').write_bytes(b'cposix\nsystem\n(S"touch /tmp/never"\ntR.')
    line = error_line(call_tool('model_converters/dit_to_diffusers.py', tmp_path / 'code.pt', tmp_path / 'out'))
    assert 'is not readable as weights: it would run posix.system, which is refused' in line

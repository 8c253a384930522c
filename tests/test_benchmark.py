"""The benchmark on a model so small that its times mean nothing: what it counts, and that it checks first."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from conftest import ROOT, error_line, needs, needs_torch
from mmengine.registry import DefaultScope

from mmaselect.apis import inference
from mmaselect.diffusion.families import SD3
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

ARGS = argparse.Namespace(device='cpu', repeats=1, batch_size=2, size=64, images=4, timesteps=3)


sys.path.insert(0, str(ROOT / 'tools'))
from benchmarks import accelerator, cache, common, families, features, scale, selection

PUBLISHED = dict(common.SHAPE)
NARROW = dict(
    num_attention_heads=1, attention_head_dim=32, caption_projection_dim=32, joint_attention_dim=32,
    pooled_projection_dim=16,
)  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    common.SHAPE.update(NARROW)
    yield common.save_model(tmp_path_factory.mktemp('model'))
    common.SHAPE.update(PUBLISHED)


def test_features_and_sweep_equal_those_of_diffusers(folder):
    """The rows exist only if they do; half the blocks, and the VAE once per image."""
    (row,) = features.bench_features(ARGS, folder)
    assert 1.7 < float(row.note.split('x fewer')[0]) < 2
    (sweep,) = selection.bench_sweep(ARGS, folder)
    assert 'VAE runs 4 against 12' in sweep.note


@needs('diffusers', '0.36', 'counting a large network without its weights')
def test_gdfs_set_and_the_encoders_share(folder):
    (unet,) = features.bench_unet(ARGS, folder)
    # Of latents this small the attention counts for less than at the model's own size.
    assert float(unet.note.split('x fewer')[0]) == pytest.approx(1.5, abs=0.01)
    (encoder,) = features.bench_encoder(ARGS, folder)
    tiny, full = (float(value.split()[0]) for value in (encoder.ours, encoder.theirs))
    assert encoder.ratio == pytest.approx(full / tiny, rel=0.1)
    assert tiny < full / 5


def count_settled(shape, block):
    """Bytes before, dropped and kept in their place, the prompt's apart: from the names and sizes of parameters."""
    with torch.device('meta'):
        network = SD3.build(shape)
    used = SD3.plan(network.config, (Tap(block, 'query'),)).parameters
    sizes = {name: value.nbytes for name, value in network.named_parameters() if name in used}
    modulation = [name for name in sizes if '.norm1.linear.' in name or '.norm1_context.linear.' in name]
    embedders = ('time_text_embed.', 'context_embedder.')
    # Of the context stream, which in the first block has seen no image yet.
    first = ('transformer_blocks.0.attn.add_', 'transformer_blocks.0.attn.norm_added_')
    gone = sum(sizes[name] for name in [*modulation, *(one for one in sizes if one.startswith((*embedders, *first)))])
    # The embedded timestep, and a layer's output is as long as its bias.
    width = 4 * shape['caption_projection_dim']
    kept = width + sum(sizes[name] for name in modulation if name.endswith('.bias'))
    # The prompt embedded, normalised, its query, key and value, and the first two of them normalised.
    return sum(sizes.values()), gone, kept, 7 * SD3.prompt_tokens * width


@needs_torch('2.6', 'counting what is kept of a timestep')
def test_a_third_of_the_weights_goes_once_the_timestep_is_chosen(folder):
    (row,) = features.bench_settled(ARGS, folder)
    before, gone, kept, prompt = count_settled(common.SHAPE, common.BLOCK)
    assert row.ratio == before / (before - gone + kept + prompt)
    # What is kept of the prompt grows with the width, weights with its square: at 32 it is a third of what went, and
    # the target is for the table's own shape.
    assert before / (before - gone + kept) > row.target == 1.4
    before, gone, kept, prompt = count_settled(PUBLISHED, common.BLOCK)
    assert before / (before - gone + kept + prompt) == pytest.approx(1.58, abs=0.01)


def test_the_accelerators_row_runs_on_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(accelerator, 'HOW', accelerator.HOW[:2])
    rows = accelerator.bench_accelerator(ARGS, folder)
    assert [row.work.split('attention=')[1] for row in rows] == ["'auto', eager", "'flash', eager"]
    for row in rows:
        assert 'images/s' in row.ours
        assert float(row.note.split(' %')[0]) > 0


@pytest.mark.parametrize(
    'name,fewer',
    [
        # The query of block 6 of 12; DiT's modulation, a constant, is done for every image by diffusers.
        ('DiT', 2.06),
        ('Flux', 1.95),
        # Behind the middle stands the whole way up, 73 % of the network: three residual blocks a level against two,
        # each of the skip as well, and every upsampler works at the level above, for all its channels.
        ('ADM', 3.82),
    ],
)
def test_a_familys_row_checks_before_it_times(name, fewer, monkeypatch):
    monkeypatch.setattr(families, 'interleave', lambda repeats, *works, clock: [1.0, 2.0])
    row = families.bench_family(ARGS, name, *families.MINIATURES[name])
    assert (row.ratio, row.met) == (2.0, row.target <= 2)
    # Whether torch counts the kernel of a CPU's attention depends on its version.
    assert float(row.note.split('x fewer')[0]) == pytest.approx(fewer, abs=0.05)


def test_nothing_is_timed_where_features_differ(folder, monkeypatch):
    def timed(*args):
        raise AssertionError('timed')

    monkeypatch.setattr(features, 'interleave', timed)
    forward = common.Baseline.forward
    monkeypatch.setattr(common.Baseline, 'forward', lambda *args: forward(*args) + 0.01)
    with pytest.raises(InputError, match=r'the features differ by 0\.01: nothing was timed'):
        features.bench_features(ARGS, folder)


def test_what_is_read_is_what_is_built(folder, monkeypatch):
    """Bytes in proportion to the blocks that run, and no tensor twice."""
    from mmaselect.diffusion import loading

    read, get = {}, loading.Tensors.get

    def counted(self, name):
        assert (self, name) not in read
        read[self, name] = get(self, name).nbytes
        return get(self, name)

    monkeypatch.setattr(loading.Tensors, 'get', counted)

    def load(block):
        read.clear()
        model = DiffusionSpec(type='SD3', pretrained=str(folder)).load((Tap(block, 'query'),))
        built = sum(tensor.nbytes for tensor in [*model.parameters(), *model.family.transformer.pos_embed.buffers()])
        assert sum(read.values()) == built
        return built

    sizes = [load(block) for block in (5, 6, 7)]
    # One more block is as much more, wherever it is added.
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0


def test_an_epoch_from_the_cache_runs_no_block(tmp_path, monkeypatch):
    from mmaselect.diffusion.reader import FrozenDiffusion

    runs, read = [], FrozenDiffusion.read

    def counted(self, latent, *rest):
        runs[-1] += len(latent)
        return read(self, latent, *rest)

    def once(repeats, *works):
        for work in works:
            runs.append(0)
            work()
        return [1.0, 30.0]

    monkeypatch.setattr(FrozenDiffusion, 'read', counted)
    monkeypatch.setattr(cache, 'interleave', once)
    runs.append(0)
    (row,) = cache.bench_cache(ARGS, tmp_path)
    # 1,200 images for the cache, 64 to compare; then an epoch with it, and one without.
    assert runs == [1264, 0, 1200]
    assert (row.ratio, row.met) == (30, True)
    DefaultScope._instance_dict.clear()


def test_growth_is_fitted_on_a_logarithmic_scale():
    sizes = (2, 5, 10, 20)
    assert common.fit_exponent(sizes, [3 * size for size in sizes]) == pytest.approx(1)
    assert common.fit_exponent(sizes, [0.1 * size**2 for size in sizes]) == pytest.approx(2)
    assert common.fit_exponent(sizes, [7] * 4) == pytest.approx(0)


def test_a_larger_size_is_extrapolated_by_a_power_law():
    sizes = (4000, 13000, 40000)
    value, exponent = scale.extrapolate(sizes, [2e-6 * size for size in sizes], 1.28e6)
    assert (value, exponent) == (pytest.approx(2.56), pytest.approx(1))
    assert scale.extrapolate(sizes, [size**0.5 for size in sizes], 1e6)[0] == pytest.approx(1000)


def test_the_median_leaves_out_the_first_run():
    calls = []
    common.interleave(3, lambda: calls.append('a'), lambda: calls.append('b'))
    assert ''.join(calls) == 'abababab'


def test_the_tool_counts_block_evaluations(call_tool, tmp_path, monkeypatch):
    # One scale: scores are not what is counted.
    select, few, one = inference.select, 16, dict(type='InstanceInformation', pool=1)
    # What one image costs is counted on 64 in the table.
    monkeypatch.setattr(
        inference,
        'select',
        lambda model, images, **options: select(model, images[:few], **options | {'num_images': few, 'criterion': one}),
    )
    done = call_tool('benchmark.py', '--rows', 'coarse', '--json', tmp_path / 'table.json')
    assert done.returncode == 0, done.stderr
    assert 'coarse-to-fine, 101 timesteps' in done.stdout
    (row,) = json.loads((tmp_path / 'table.json').read_text())
    ours, theirs = (int(row[side].split()[0]) for side in ('ours', 'theirs'))
    # Two noises, five blocks, and no more than a third of the timesteps.
    assert ours % (few * 2 * 5) == 0
    assert ours <= few * 2 * 5 * 34
    # Heads on every block and component: 20 epochs of 1,200 images and a test of 597, through 1 to 5 blocks each.
    assert theirs == 101 * 5 * (1 + 2 + 3 + 4 + 5) * (20 * 1200 + 597)
    assert row['ratio'] == theirs / ours > 100
    assert row['met'] is True


def test_bad_arguments(call_tool):
    assert '--repeats 0 is not valid' in error_line(call_tool('benchmark.py', '--rows', 'coarse', '--repeats', 0))

"""What makes a pass faster must not change it: kernels, compiled blocks, half precision, constants that are kept."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, family_of, needs_torch
from torch.overrides import TorchFunctionMode

from mmaselect.diffusion import acceleration
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.network import KEPT_TIMESTEPS
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

#: Dual attention, none, and the last block.
TAPS = [Tap(1, 'query'), Tap(2, 'attention'), Tap(3, 'output')]


def load(variant, taps=TAPS, **options):
    return DiffusionSpec(type=family_of(variant), arch=TINY[variant], latent='vae', **options).load(taps).family


def noisy(variant, batch=2, seed=0):
    return torch.randn(batch, TINY[variant]['in_channels'], 8, 8, generator=torch.Generator().manual_seed(seed))


def error(read, expected):
    """Largest relative error (Frobenius norm) over the taps."""
    return max(((read[tap].float() - expected[tap]).norm() / expected[tap].norm()).item() for tap in expected)


@pytest.fixture(scope='module')
def eager():
    return {variant: load(variant)(noisy(variant), 300.0) for variant in ('SD3.5-medium', 'DiT')}


@pytest.mark.parametrize('variant', ['SD3.5-medium', 'DiT'])
@pytest.mark.parametrize('kernel', ['math', 'flash'])
def test_kernels_agree(eager, variant, kernel):
    assert error(load(variant, attention=kernel)(noisy(variant), 300.0), eager[variant]) < 1e-5


@pytest.mark.parametrize('kernel', ['efficient', pytest.param('cudnn', marks=needs_torch('2.5', "attention='cudnn'"))])
def test_a_kernel_that_this_machine_lacks_is_said_in_a_line(kernel):
    model = load('DiT', attention=kernel)
    with pytest.raises(
        InputError, match=rf"attention='{kernel}' has no kernel for this model on cpu: set attention='auto'"
    ):
        model(noisy('DiT'), 300.0)


def test_a_kernel_that_came_later_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(acceleration.ATTENTION, 'cudnn', None)
    with pytest.raises(InputError, match=r"attention='cudnn' needs torch >= 2.5, found 2\."):
        load('DiT', attention='cudnn')


def test_another_kernel_does_not_leak_out_of_a_pass():
    model = load('DiT', attention='math')
    before = torch.backends.cuda.flash_sdp_enabled()
    model(noisy('DiT'), 300.0)
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_compiled_blocks_agree(eager):
    model = load('SD3.5-medium', [TAPS[-1]], compile=True)
    torch._dynamo.utils.counters.clear()
    found = model(noisy('SD3.5-medium'), 300.0)[TAPS[-1]]
    torch.testing.assert_close(found, eager['SD3.5-medium'][TAPS[-1]], rtol=1e-5, atol=1e-5)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    # First (one prompt for all images), dual, and without; nothing fell back, and a second pass compiles nothing.
    assert graphs == 3
    other = noisy('SD3.5-medium', seed=1)
    expected = load('SD3.5-medium')(other, 700.0)[TAPS[-1]]
    torch.testing.assert_close(model(other, 700.0)[TAPS[-1]], expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == graphs
    assert not torch._dynamo.utils.counters['graph_break']


@pytest.mark.parametrize('variant', ['SD3.5-medium', 'DiT'])
@pytest.mark.parametrize(
    'dtype,allowed',
    [('bfloat16', 2e-2), pytest.param('float16', 2.5e-3, marks=needs_torch('2.6', 'float16 on a CPU'))],
)
def test_half_precision_is_near(eager, variant, dtype, allowed):
    """The relative errors that docs/en/speed.md states; bfloat16 has 8 bits, float16 11."""
    model = load(variant, dtype=dtype)
    found = error(model(noisy(variant).to(getattr(torch, dtype)), 300.0), eager[variant])
    assert allowed / 20 < found < allowed


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(attention='fast'), "attention='fast' is not known; choose from: auto, flash, efficient, cudnn, math"),
        (dict(compile='fast'), "compile='fast' is not known; choose from: False, True, default, max-autotune"),
        (dict(compile=1.5), 'compile=1.5 is not known'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        load('DiT', **options)


class CountCalls(TorchFunctionMode):
    """Notes the batch of every use of some linear layers: a forward hook would see those that are remembered, too."""

    def __init__(self, layers):
        super().__init__()
        self.weights, self.batches = [layer.weight for layer in layers], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and any(args[1] is weight for weight in self.weights):
            self.batches.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('variant', ['SD3.5-medium', 'DiT'])
def test_constants_are_computed_once_per_timestep(variant):
    """At batch 1, whatever the batch: neither images nor passes make it more."""
    model = load(variant)
    blocks = model.transformer.transformer_blocks
    last = model.last_block + 1
    layers = [block.norm1.linear for block in blocks[:last]]
    if variant == 'SD3.5-medium':
        embed = model.transformer.time_text_embed.timestep_embedder.linear_1
        layers += [model.transformer.context_embedder, embed, blocks[0].attn.add_k_proj]
    with CountCalls(layers) as calls:
        for batch in (2, 5, 3):
            model(noisy(variant, batch), 300.0)
        assert calls.batches == [1] * len(layers)
        model(noisy(variant), 700.0)
        model(noisy(variant), 300.0)
    assert calls.batches == [1] * 2 * len(layers)


def test_constants_do_not_grow_with_the_timesteps():
    model = load('DiT')
    for timestep in range(0, 1000, 50):
        model(noisy('DiT', 1), float(timestep))
    assert len(model._constants) == KEPT_TIMESTEPS
    with CountCalls([model.transformer.transformer_blocks[0].norm1.linear]) as calls:
        model(noisy('DiT', 1), 950.0)
        assert calls.batches == []
        model(noisy('DiT', 1), 0.0)
    assert calls.batches == [1]


def test_constants_follow_the_model_to_another_dtype():
    model = load('DiT')
    expected = load('DiT').to(torch.bfloat16)(noisy('DiT').bfloat16(), 300.0)
    model(noisy('DiT'), 300.0)
    read = model.to(torch.bfloat16)(noisy('DiT').bfloat16(), 300.0)
    assert all(torch.equal(read[tap], expected[tap]) for tap in expected)


def test_constants_of_autocast_are_kept_apart():
    model, latent = load('DiT'), noisy('DiT')
    before = model(latent, 300.0)
    with torch.autocast('cpu', torch.bfloat16):
        half = model(latent, 300.0)
    after = model(latent, 300.0)
    assert all(torch.equal(before[tap], after[tap]) for tap in before)
    assert half[TAPS[0]].dtype == torch.bfloat16
    assert error(half, before) < 2e-2


def test_constants_end_with_the_blocks_that_are_dropped(eager):
    model = load('DiT')
    model(noisy('DiT'), 300.0)
    model.narrow(TAPS[:1])
    assert torch.equal(model(noisy('DiT'), 300.0)[TAPS[0]], eager['DiT'][TAPS[0]])


def size(model):
    return sum(parameter.nbytes for parameter in model.transformer.parameters())


#: What feeds constants only, by parts of its name. The context stream of SD3's first block has seen no image yet; each
#: block of diffusers' DiT has an embedding of timesteps and a table of classes of its own.
BEHIND_CONSTANTS = {
    'SD3.5-medium': (
        'time_text_embed.', 'context_embedder.', '.norm1.linear.', '.norm1_context.linear.', 'blocks.0.attn.add_',
        'blocks.0.attn.norm_added_',
    ),
    'DiT': ('.norm1.emb.', '.norm1.linear.'),
}  # fmt: skip


@pytest.mark.parametrize('variant', ['SD3.5-medium', 'DiT'])
def test_weights_behind_constants_go_once_the_timestep_is_settled(variant):
    """A third of a block; features stay equal to the bit, and whatever needs the weights again gets them."""
    model, fresh, latent = load(variant), load(variant), noisy(variant)
    expected = {timestep: fresh(latent, timestep) for timestep in (300.0, 700.0)}

    def check(timestep, given=model, wanted=expected):
        read = given(latent, timestep)
        assert all(torch.equal(read[tap], wanted[timestep][tap]) for tap in TAPS)

    before, parameters = size(model), dict(model.transformer.named_parameters())
    behind = {name for name in parameters if any(part in name for part in BEHIND_CONSTANTS[variant])}
    expected_left = before - sum(parameters[name].nbytes for name in behind)
    check(300.0)
    assert size(model) == before
    model.settle_on([300.0])
    check(300.0)
    left = size(model)
    assert {name for name, value in model.transformer.named_parameters() if not value.numel()} == behind
    assert left == expected_left < 0.7 * before
    check(300.0)
    # Another timestep reads them again, and they stay: who reads one will read more.
    for timestep in (700.0, 300.0):
        check(timestep)
        assert size(model) == before
    # Of two, both must be known.
    model.settle_on([300.0, 100.0])
    model.to(torch.bfloat16)
    halved, wanted = latent.bfloat16(), load(variant).to(torch.bfloat16)
    for timestep in (300.0, 100.0, 300.0):
        read, known = model(halved, timestep), wanted(halved, timestep)
        assert all(torch.equal(read[tap], known[tap]) for tap in TAPS)
    assert size(model) == left / 2


def test_weights_that_went_are_read_from_the_files_that_they_came_from(model_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / 'model'
    shutil.copytree(model_folder('SD3.5-medium'), folder)
    taps, latent = [Tap(2, 'query'), Tap(1, 'output')], noisy('SD3.5-medium')
    spec = DiffusionSpec(type='SD3', pretrained=str(folder))
    model, fewer = spec.load(taps), spec.load(taps[1:])
    # Nothing of the network was computed by its constructor, nor left without a value.
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    identity, other = model.identity, model.family(latent, 500.0)
    model.settle_on([300.0])
    expected = model.family(latent, 300.0)
    assert size(model.family) < 0.7 * size(spec.load(taps).family)
    assert model.identity == identity
    assert torch.equal(model.family(latent, 500.0)[taps[0]], other[taps[0]])
    model.settle_on([300.0])
    assert torch.equal(model.family(latent, 300.0)[taps[0]], expected[taps[0]])
    model.narrow(taps[1:])
    assert model.identity == fewer.identity
    assert torch.equal(model.family(latent, 300.0)[taps[1]], expected[taps[1]])
    # Another file in its place is noticed.
    (file,) = (folder / 'transformer').glob('*.safetensors')
    save_file({name: value + 1 for name, value in load_file(file).items()}, tmp_path / 'new')
    (tmp_path / 'new').replace(file)
    with pytest.raises(InputError, match='is not what it was when the model was loaded: its file has changed'):
        model.family(latent, 700.0)

"""Maps of unlike sizes, of the family of docs/en/add_a_network.md: backbone, cache, selection, probes and UPerNet."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch
from conftest import ROOT
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

from mmaselect.apis import extract
from mmaselect.backbones import ASelectDiT
from mmaselect.diffusion.families import FAMILIES
from mmaselect.diffusion.noise import seeded_noise
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError
from mmaselect.evaluation.probe import Cells
from mmaselect.images import Batch
from mmaselect.selection.criteria import FisherScore, HighFrequencyRatio, InstanceInformation
from mmaselect.selection.search import Search, run

CHANNELS, STRIDES = (32, 16, 8), (4, 2, 1)


def read_example(page):
    """Runs the first block of Python of a page of the docs, and gives its names."""
    text = (ROOT / 'docs' / 'en' / page).read_text(encoding='utf-8')
    names = {}
    exec(compile(text.split('```python\n')[1].split('```')[0], page, 'exec'), names)
    return names


Pyramid = read_example('add_a_network.md')['Pyramid']
# For other tests it is not there.
del FAMILIES['Pyramid']


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(FAMILIES, 'Pyramid', Pyramid)


DIFFUSION = dict(type='Pyramid', arch='tiny', latent='pixels')
TAPS = tuple(Tap(block, 'output') for block in range(3))


def build(**fields):
    return ASelectDiT(DIFFUSION, **{'block': [0, 1, 2], 'component': 'output', 'timestep': 100, **fields}).eval()


def images(height=16, width=24, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_the_backbone_knows_every_map_before_a_weight_is_read():
    with torch.device('meta'):
        backbone = build()
    assert (backbone.out_channels, backbone.strides, backbone.multiple) == (CHANNELS, STRIDES, 4)
    assert build(timestep=[100, 500]).out_channels == CHANNELS * 2


def test_maps_are_those_of_diffusers_full_pass():
    backbone, seen = build(mean=(0, 0, 0), std=(127.5,) * 3), []
    # Before the pass: weights that only constants need go with it.
    state = backbone.diffusion.family.transformer.state_dict()
    maps = backbone(images() + 1)
    latent = backbone.diffusion.family.process.add_noise(images(), seeded_noise(tuple(images().shape[1:]), 0), 100)
    whole = Pyramid.build(Pyramid.complete(Pyramid.architectures['tiny'])).eval()
    whole.load_state_dict(state, strict=False)
    for block in whole.up_blocks:
        block.resnets[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        whole(latent, 100)
    assert [tuple(one.shape[1:]) for one in maps] == [(32, 4, 6), (16, 8, 12), (8, 16, 24)]
    for one, other in zip_longest(maps, seen):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_was_padded_is_cropped_from_each_map():
    """Of a constant image of any size, maps of a size that needs no padding."""
    backbone = build(mean=(0, 0, 0), std=(1, 1, 1))
    maps = backbone(images(height=13, width=23))
    assert [tuple(one.shape[1:]) for one in maps] == [(32, 4, 6), (16, 8, 12), (8, 16, 24)]


def test_a_choice_among_unlike_channels_is_refused_by_the_backbone():
    with pytest.raises(InputError, match=r'leave a choice among maps of 32 \(block 0, output\), 16 '):
        build(block='auto')


def test_selection_reads_every_size():
    backbone = build()
    model = backbone.diffusion
    labels = torch.randint(0, 3, (6, 16, 16), generator=torch.Generator().manual_seed(1))
    criteria = [InstanceInformation(), HighFrequencyRatio(), FisherScore()]
    search = Search(model, [0, 300], criteria, [(tap,) for tap in TAPS])
    sweep = run(search, [[Batch(images(16, 16, 6).clamp(-1, 1), range(6), labels)]])
    for criterion in criteria:
        assert set(sweep.scores[criterion.label]) == set(TAPS)
    # By hand, for one map: labels of the pixels in the middle of its cells.
    noise = torch.zeros(6, 3, 16, 16) + search._draw((3, 16, 16), range(6), 0)
    maps = model(images(16, 16, 6).clamp(-1, 1), noise, 300)[TAPS[1]]
    from mmaselect.selection.spectrum import fisher_score

    cells = maps.permute(0, 2, 3, 1).flatten(0, 2)
    expected = fisher_score(cells, labels[:, 1::2, 1::2].flatten()).item()
    assert sweep.scores['Fisher Score (labels)'][TAPS[1]][1] == pytest.approx(expected, rel=1e-4)


def test_a_probes_cells_lie_in_the_same_place_of_every_map():
    place = torch.tensor([[0.1, 0.9], [0.6, 0.3]])
    cells = Cells(torch.tensor([1, 0]), place, torch.tensor([0, 1]))
    for side in (4, 8, 16):
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')).float()
        maps = torch.stack([grid, grid + 100])
        read = cells.of(maps)
        assert torch.equal(read, (place * side).floor() + torch.tensor([[100.0], [0.0]]))


def test_extraction_gives_each_map_its_size():
    features = extract(DIFFUSION, torch.rand(2, 3, 16, 24), 100, block=[0, 2], component='output', size=(16, 24))
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        (100, 0, 'output'): (2, 32, 4, 6),
        (100, 2, 'output'): (2, 8, 16, 24),
    }


def test_upernet_is_trained_on_three_sizes():
    register_all_modules(init_default_scope=True)
    head = dict(
        type='UPerHead', in_channels=list(CHANNELS[::-1]), in_index=[2, 1, 0], channels=8, num_classes=3,
        pool_scales=(1, 2), align_corners=False, loss_decode=dict(type='CrossEntropyLoss'),
    )  # fmt: skip
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(16, 24)),
            backbone=dict(
                type='mmaselect.ASelectDiT', diffusion=DIFFUSION, block=[0, 1, 2], component='output', timestep=100
            ),
            decode_head=head,
        )
    )
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, 16, 24)))) for _ in range(2)]
    model.backbone.set_normalisation((0, 0, 0), (1, 1, 1))
    losses = model.loss(images(), samples)
    losses['decode.loss_ce'].backward()
    assert losses['decode.loss_ce'] > 0
    # Maps from the cache give what images give.
    with torch.no_grad():
        model.eval()
        meta = [dict(img_shape=(16, 24))]
        maps = model.backbone(images())
        torch.testing.assert_close(model.encode_decode(images(), meta), model.encode_decode(maps, meta))

"""Batches that fit memory."""

from __future__ import annotations

import logging

import pytest
import torch

from mmaselect import extract
from mmaselect.diffusion import memory
from mmaselect.diffusion.memory import Halving, check_batch_size, fit_batch_size, halve_images, join_maps
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError

OUT_OF_MEMORY = {
    'accelerator': torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    'cpu': RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
}


@pytest.fixture(scope='module')
def model(model_folder):
    return DiffusionSpec(type='DiT', pretrained=str(model_folder('DiT'))).load([Tap(2, 'query')])


@pytest.mark.parametrize(
    'taken,free,expected',
    [
        # Of 800 bytes half may be taken; four images take 100.
        (100, 800, 16),
        (100, 799, 8),
        (100, 100, 4),
        (100, 0, 4),
        (0, 1, 16),
    ],
)
def test_as_many_as_fit(model, monkeypatch, taken, free, expected):
    passes = []
    monkeypatch.setattr(memory, '_measure_cpu', lambda work: (work(), (taken, free))[1])
    model.family.transformer.pos_embed.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    assert fit_batch_size(model, torch.zeros(3, 64, 64), 4, draws=2) == expected
    assert passes == [8]


def test_where_memory_cannot_be_measured(model, monkeypatch):
    monkeypatch.setattr(memory, '_measure_cpu', lambda work: None)
    assert fit_batch_size(model, torch.zeros(3, 64, 64), 4) == 16
    assert fit_batch_size(model, torch.zeros(3, 64, 64), 3) == 15


def test_the_peak_is_measured_and_not_what_remains():
    held = []

    def work():
        held.append(torch.ones(50_000_000 // 4))
        torch.ones(200_000_000 // 4)

    taken, free = memory._measure_cpu(work)
    assert 0.95 * 250e6 < taken < 1.1 * 250e6
    assert free > 1e8


@pytest.mark.parametrize('error', OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_halves_give_what_the_whole_would_have(error, caplog):
    sizes = []

    def run(images):
        sizes.append(len(images))
        if len(images) > 3:
            raise error
        return [2 * images, images.sum(1)]

    halving, images = Halving(run, halve_images), torch.rand(10, 4)
    with caplog.at_level(logging.WARNING, 'mmaselect'):
        for _ in range(2):
            doubled, summed = join_maps(halving(images))
            assert torch.equal(doubled, 2 * images)
            assert torch.equal(summed, images.sum(1))
    # What did not fit is not tried again.
    assert sizes == [10, 5, 3, 2, 3, 2, 3, 2, 3, 2]
    assert [record.getMessage() for record in caplog.records] == [
        '10 images at once do not fit memory: going on with 5',
        '5 images at once do not fit memory: going on with 3',
    ]


def test_one_image_that_does_not_fit_is_said_in_a_line():
    def run(images):
        raise OUT_OF_MEMORY['cpu']

    with pytest.raises(InputError, match='a single image does not fit memory: use smaller images, or a smaller dtype'):
        Halving(run, halve_images)(torch.rand(2, 3))


def test_other_errors_are_not_hidden():
    def run(images):
        raise RuntimeError('shapes do not fit')

    with pytest.raises(RuntimeError, match='shapes do not fit'):
        Halving(run, halve_images)(torch.rand(2, 3))


@pytest.mark.parametrize('noise', ['fixed', 'fresh'])
def test_extraction_goes_on_with_halves(model, monkeypatch, noise):
    images = torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = extract(model, images, 100, noise=noise)
    read, sizes = type(model).read, []

    def limited(self, latent, *rest):
        sizes.append(len(latent))
        if len(latent) > 4:
            raise OUT_OF_MEMORY['accelerator']
        return read(self, latent, *rest)

    monkeypatch.setattr(type(model), 'read', limited)
    read = extract(model, images, 100, noise=noise, batch_size=7)
    assert sizes == [7, 4, 3]
    assert torch.allclose(read, expected, atol=1e-5)


def test_the_size_of_a_batch_does_not_change_what_is_read(model):
    images = torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = [extract(model, images, [100, 500], batch_size=size) for size in (1, 3, 'auto')]
    for key, value in features[0].items():
        assert all(torch.allclose(other[key], value, atol=1e-5) for other in features[1:])


@pytest.mark.parametrize('value', [0, -1, 1.5, True, 'many'])
def test_bad_batch_sizes(value):
    with pytest.raises(InputError, match=r"is not valid: give a whole number of at least 1, or 'auto'"):
        check_batch_size(value)

"""The pixel ensemble without a runner: what a pixel reads, how members vote, when they stop."""

from __future__ import annotations

import pytest
import torch

from mmaselect.errors import InputError
from mmaselect.tasks.correspondence import sample
from mmaselect.tasks.label_scarce import PixelEnsemble, fit, ignore_rare, pixels_of, places_of, vote


def test_pixels_are_interpolated_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 4, 5, 7, generator=generator), torch.randn(3, 2, 12, 9, generator=generator)]
    image, places = torch.tensor([0, 2, 1, 1, 0]), torch.rand(5, 2, generator=generator)
    places[0], places[1] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.001])
    expected = torch.stack([sample([one[number] for one in maps], place[None])[0]
                            for number, place in zip(image, places)])  # fmt: skip
    torch.testing.assert_close(pixels_of(maps, image, places), expected)
    # All pixels of an image: what resizing gives.
    whole = pixels_of(maps[:1], torch.ones(20 * 14, dtype=torch.long), places_of(20, 14))
    resized = torch.nn.functional.interpolate(maps[0], (20, 14), mode='bilinear')[1]
    torch.testing.assert_close(whole, resized.flatten(1).T)


def test_the_majority_decides():
    ensemble = PixelEnsemble(3, 4, members=5).eval()
    pixels = torch.randn(50, 3)
    votes = ensemble(pixels)
    single = torch.stack([member(pixels).argmax(1) for member in ensemble.members])
    assert votes.sum(1).tolist() == [5] * 50
    expected = [[(one == label).sum().item() for label in range(4)] for one in single.T]
    assert votes.tolist() == expected
    maps = [torch.randn(2, 3, 4, 6)]
    counted = vote(ensemble, maps, (4, 6))
    assert torch.equal(counted[1], ensemble(maps[0][1].flatten(1).T).T.reshape(4, 4, 6).float())


def test_the_form_of_a_member():
    ensemble = PixelEnsemble(3520, 21)
    assert len(ensemble.members) == 10
    sizes = [module.weight.shape for module in ensemble.members[0] if isinstance(module, torch.nn.Linear)]
    assert [tuple(size) for size in sizes] == [(128, 3520), (32, 128), (21, 32)]
    assert ensemble.members[0][0].weight.std().item() == pytest.approx(0.02, rel=0.01)
    kinds = [type(module).__name__ for module in ensemble.members[0]]
    assert kinds == ['Linear', 'ReLU', 'BatchNorm1d', 'Linear', 'ReLU', 'BatchNorm1d', 'Linear']


def test_classes_with_a_few_pixels_are_ignored():
    labels = torch.zeros(2, 10, 10, dtype=torch.long)
    labels[0, 0, :] = 1
    labels[0, 1:3] = 2
    labels[1, :3] = 1
    kept = ignore_rare(labels, 20)
    assert kept[0].unique().tolist() == [0, 2, 255]
    assert (kept[0] == 255).sum() == 10
    assert torch.equal(kept[1], labels[1])
    assert labels.max() == 2


def scene(count=4, side=16):
    """Maps in which one channel is the class, blurred by noise; the last row has no label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (count, side // 4, side // 4), generator=generator)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    maps = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    labels[:, -1] = 255
    return [maps + 0.3 * torch.randn(maps.shape, generator=generator)], labels


def test_an_ensemble_learns_and_stops():
    maps, labels = scene()
    torch.manual_seed(0)
    epochs = []
    settings = dict(lr=1e-2, patience=10)
    ensemble = fit(PixelEnsemble(3, 3, 2), maps, labels, **settings, on_epoch=lambda *line: epochs.append(line))
    assert not ensemble.training
    predicted = vote(ensemble, maps, (16, 16)).argmax(1)
    valid = labels != 255
    assert (predicted == labels)[valid].float().mean() > 0.95
    # Each member stopped by itself, in the fifth epoch or later, long before the hundredth.
    last = [max(epoch for number, epoch, _ in epochs if number == member) for member in range(2)]
    assert all(5 <= epoch < 100 for epoch in last)
    assert len(epochs) == sum(last)
    again = []
    torch.manual_seed(0)
    fit(PixelEnsemble(3, 3, 2), maps, labels, **settings, on_epoch=lambda *line: again.append(line))
    assert again == epochs


def test_the_rule_of_stopping():
    """Fifteen batches an epoch; with a learning rate of nothing only the order of pixels changes a loss."""
    maps, labels = scene()
    seen = []
    torch.manual_seed(1)
    fit(PixelEnsemble(3, 3, members=1), maps, labels, lr=1e-12, patience=1, on_epoch=lambda *line: seen.append(line[1]))
    assert seen == [1, 2, 3, 4, 5]
    seen.clear()
    fit(PixelEnsemble(3, 3, members=1), maps, labels, epochs=3, patience=1, on_epoch=lambda *line: seen.append(line[1]))
    assert seen == [1, 2, 3]


def test_one_line_for_what_is_wrong():
    maps, labels = scene()
    with pytest.raises(InputError, match='0 labelled pixels of 4 label maps'):
        fit(PixelEnsemble(3, 3), maps, torch.full_like(labels, 255))
    with pytest.raises(InputError, match='960 labelled pixels of 4 label maps, for maps of 2 images'):
        fit(PixelEnsemble(3, 3), [maps[0][:2]], labels)
    with pytest.raises(InputError, match='members=0 is not valid'):
        PixelEnsemble(3, 3, 0)
    with pytest.raises(InputError, match='batch_size=1 is not valid'):
        fit(PixelEnsemble(3, 3), maps, labels, batch_size=1)

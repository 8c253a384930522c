"""Segmentation from a few labelled images: an ensemble of small networks that read pixels one by one.

The protocol of DatasetGAN (arXiv 2104.06490), DDPM-Segmentation (arXiv 2112.03126) and GDF (arXiv 2410.03558).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmaselect.errors import InputError, check_count
from mmaselect.progress import PATIENCE, progress_bar

#: Pixels that are classified at once.
PIXELS = 16384


class PixelEnsemble(nn.Module):
    """Networks of the same form that are trained apart and vote on each pixel.

    Each: ``C -> 128 -> 32 -> classes``, after the first two layers a ReLU, then batch norm; weights are drawn from
    N(0, 0.02).

    Args:
        in_channels: Channels of a pixel, of all maps together.
        num_classes: Classes.
        members: Networks.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(self, in_channels: int, num_classes: int, members: int = 10) -> None:
        super().__init__()
        for name, value in (('in_channels', in_channels), ('num_classes', num_classes), ('members', members)):
            check_count(value, name)
        self.num_classes = num_classes
        self.members = nn.ModuleList(
            nn.Sequential(
                nn.Linear(in_channels, 128), nn.ReLU(), nn.BatchNorm1d(128),
                nn.Linear(128, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, num_classes),
            )
            for _ in range(members)
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """How many members vote for each class: (N, C) to (N, classes), whole numbers."""
        votes = torch.stack([member(pixels).argmax(1) for member in self.members], 1)
        return F.one_hot(votes, self.num_classes).sum(1)


def pixels_of(maps: Sequence[Tensor], image: Tensor, places: Tensor) -> Tensor:
    """Features of pixels, interpolated bilinearly in each map, those of all maps in one vector.

    Args:
        maps: (B, C, h, w), of any sizes.
        image: Number of the image of each pixel, (N,).
        places: Shares of width and height, (N, 2).

    Returns:
        (N, sum of C).
    """
    read = []
    for one in maps:
        size = places.new_tensor([one.shape[3], one.shape[2]])
        # The middle of a cell is where its value holds; beyond that of the last one, it stays.
        position = (places * size - 0.5).clamp(min=torch.zeros_like(size), max=size - 1)
        low = position.floor()
        (column, row), (right, down) = low.long().unbind(1), torch.minimum(low + 1, size - 1).long().unbind(1)
        across, along = (position - low).to(one.dtype)[..., None].unbind(1)
        above = one[image, :, row, column] * (1 - across) + one[image, :, row, right] * across
        below = one[image, :, down, column] * (1 - across) + one[image, :, down, right] * across
        read.append(above * (1 - along) + below * along)
    return torch.cat(read, 1)


def places_of(height: int, width: int, device: torch.device | str = 'cpu') -> Tensor:
    """Middles of all pixels as shares of width and height, row by row, (height * width, 2)."""
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return torch.stack([x.flatten(), y.flatten()], 1)


@torch.no_grad()
def vote(ensemble: PixelEnsemble, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Classifies every pixel.

    Args:
        ensemble: In evaluation mode.
        maps: (B, C, h, w), of any sizes.
        size: Height and width of the prediction.

    Returns:
        Votes for each class, (B, classes, height, width), float32; the class of a pixel is that of the most votes.
    """
    places, out = places_of(*size, maps[0].device), []
    for number in range(len(maps[0])):
        found = []
        for part in places.split(PIXELS):
            image = torch.full((len(part),), number, device=part.device)
            found.append(ensemble(pixels_of(maps, image, part)))
        out.append(torch.cat(found).T.reshape(-1, *size))
    return torch.stack(out).float()


def ignore_rare(labels: Tensor, least: int = 20, ignored: int = 255) -> Tensor:
    """Label maps (B, H, W) in which a class that has fewer than ``least`` pixels of an image is ignored there."""
    labels = labels.clone()
    for one in labels:
        values, counts = one.unique(return_counts=True)
        for value in values[counts < least]:
            one[one == value] = ignored
    return labels


def fit(
    ensemble: PixelEnsemble,
    maps: Sequence[Tensor],
    labels: Tensor,
    epochs: int = 100,
    batch_size: int = 64,
    lr: float = 1e-3,
    patience: int = 50,
    first_stop: int = 5,
    seed: int = 0,
    ignored: int = 255,
    on_epoch: Callable[[int, int, float], object] | None = None,
) -> PixelEnsemble:
    """Trains an ensemble by GDF's protocol: Adam on batches of pixels, each member until it learns nothing more.

    Args:
        ensemble: What to train.
        maps: Of the training images, (B, C, h, w), of any sizes.
        labels: (B, H, W); ``ignored`` belongs to no class.
        epochs: At most so many passes over all pixels.
        batch_size: Pixels.
        lr: Learning rate.
        patience: A member stops after so many batches without a new lowest loss,
        first_stop: but not before this epoch, counted from 1.
        seed: Of the order of pixels.
        ignored: See ``labels``.
        on_epoch: Called with member, epoch and the mean loss of the epoch.

    Returns:
        The ensemble, in evaluation mode.

    Raises:
        InputError: If an argument is out of range, or no pixel has a label.
    """
    for name, value in (('epochs', epochs), ('batch_size', batch_size), ('patience', patience)):
        check_count(value, name, 2 if name == 'batch_size' else 1)
    count, height, width = labels.shape
    valid = (labels != ignored).flatten().nonzero().flatten()
    if count != len(maps[0]) or len(valid) < batch_size:
        raise InputError(f'{len(valid)} labelled pixels of {count} label maps, for maps of {len(maps[0])} images')
    places = places_of(height, width, labels.device)
    generator = torch.Generator().manual_seed(seed)
    ensemble.train()
    members = progress_bar(iterable=ensemble.members, desc='training', unit='members', delay=PATIENCE, leave=False)
    for number, member in enumerate(members):
        optimizer = torch.optim.Adam(member.parameters(), lr=lr)
        lowest, since = float('inf'), 0
        for epoch in range(1, epochs + 1):
            order, losses = valid[torch.randperm(len(valid), generator=generator)], []
            # A last batch of a single pixel has no variance to normalise by.
            for part in order[: len(order) // batch_size * batch_size].split(batch_size):
                pixel = part % (height * width)
                features = pixels_of(maps, part // (height * width), places[pixel])
                loss = F.cross_entropy(member(features), labels.flatten()[part].long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                lowest, since = (losses[-1], 0) if losses[-1] < lowest else (lowest, since + 1)
                if epoch >= first_stop and since > patience:
                    break
            if on_epoch is not None:
                on_epoch(number, epoch, sum(losses) / len(losses))
            if epoch >= first_stop and since > patience:
                break
    return ensemble.eval()

"""Latents to train on: images are encoded once, with their mirror images, and kept in one file."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset

from mmaselect.cache.fingerprint import fingerprint
from mmaselect.diffusion.latent import find_vae, load_vae
from mmaselect.diffusion.loading import Identity
from mmaselect.errors import InputError, check_count, check_flag, one_line
from mmaselect.files import atomic_path, remove_abandoned
from mmaselect.progress import progress_bar

#: Part of every key: another number where the same settings give other latents.
VERSION = 1


@DATASETS.register_module()
class LatentDataset(Dataset):
    """Standardised latents of the images of one or several data sets.

    The images are encoded when the data set is built for the first time, by the first rank, on its accelerator if it
    has one. What transforms draw at random depends on ``seed`` and the position of the image alone.

    Args:
        vae: Folder or hub id of the autoencoder.
        datasets: Configs of data sets with images of one size, which their pipelines give as ``inputs``, (3, H, W) in
            [0, 255], BGR, as ``PackInputs`` does. ``RepeatDataset`` draws several crops of each image.
        cache: Safetensors file that keeps the latents. It is made anew where it is damaged, or made by another encoder
            or of other files or transforms.
        mirror: Add the mirror image of each image.
        seed: Of the transforms.
        batch_size: Images that are encoded at once.

    Attributes:
        encoder: The encoder, which standardises as the data set does.
        latents: (N, C, h, w), float16, not standardised; every mirror image comes right after its image.

    Raises:
        InputError: If a field is wrong, or images have several sizes, or one that the encoder cannot take.
    """

    metainfo: dict[str, Any] = {}

    def __init__(
        self,
        vae: str | Path,
        datasets: Sequence[dict[str, Any]],
        cache: str | Path,
        mirror: bool = True,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        check_flag(mirror, 'mirror')
        check_count(seed, 'seed', 0)
        check_count(batch_size, 'batch_size')
        if not isinstance(datasets, (list, tuple)) or not datasets:
            raise InputError(f'datasets={datasets!r} is not valid: give a list of configs of data sets')
        if not isinstance(cache, (str, Path)) or Path(cache).suffix != '.safetensors':
            raise InputError(f'cache={cache!r} is not valid: give the name of a .safetensors file')
        self.mirror, self.seed, self.batch_size, self.cache = mirror, seed, batch_size, Path(cache)
        identity = Identity()
        self.encoder = load_vae(*find_vae(vae), identity, torch.float32).requires_grad_(False).eval()
        self.datasets = [DATASETS.build(config) for config in datasets]
        transforms = [find_pipelines(config) for config in datasets]
        # By name and size: to read all images again would take longer than to encode them.
        self.key = fingerprint([VERSION, identity.digest().hex(), mirror, seed, transforms, self._files()]).hex()
        if is_main_process() and read_latents(self.cache, self.key) is None:
            self._write()
        barrier()
        content = read_latents(self.cache, self.key)
        if content is None:
            raise InputError(
                f'cache={str(cache)!r} is not seen by all ranks, or another run wrote it: give another file'
            )
        self.latents = content['latents']
        self.mean, self.std = (content[name].float().view(-1, 1, 1) for name in ('mean', 'std'))
        self.encoder.standardise(content['mean'].tolist(), content['std'].tolist())

    def __len__(self) -> int:
        """Latents, those of mirror images among them."""
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One standardised latent, float32, as ``inputs``."""
        return {'inputs': (self.latents[index].float() - self.mean) / self.std}

    def _files(self) -> list[list[Any]]:
        """Name and size of every image; a name without the folders above its own, since data may be moved."""
        found = []
        for dataset in self.datasets:
            for index in range(len(dataset)):
                name = dataset.get_data_info(index).get('img_path')
                if name is None:
                    raise InputError(f'{type(dataset).__name__} has no files of images: its latents cannot be kept')
                try:
                    found.append([*Path(name).parts[-2:], Path(name).stat().st_size])
                except OSError as error:
                    raise InputError(f'{name} cannot be read: {one_line(error)}') from error
        return found

    def _image(self, number: int, dataset: Any, index: int) -> Tensor:
        """An image as its pipeline gives it, (3, H, W) in [-1, 1], RGB."""
        # What mmcv's transforms draw from.
        seed = int(np.random.SeedSequence([self.seed, number, index]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        image = dataset[index].get('inputs')
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
            raise InputError(f'datasets[{number}] gives no colour image as inputs: end its pipeline with PackInputs')
        if any(side % self.encoder.factor for side in image.shape[1:]):
            raise InputError(
                f'datasets[{number}] gives images of {tuple(image.shape[1:])}: let its pipeline resize or crop them to '
                f'multiples of {self.encoder.factor}, what the encoder makes one latent pixel of'
            )
        return image.flip(0) / 127.5 - 1

    def _encode(self) -> Tensor:
        items = [(number, data, index) for number, data in enumerate(self.datasets) for index in range(len(data))]
        latents: list[Tensor] = []
        sizes: set[tuple[int, ...]] = set()
        with progress_bar(total=len(items), desc='encoding', unit='images') as bar:
            for start in range(0, len(items), self.batch_size):
                images = [self._image(*item) for item in items[start : start + self.batch_size]]
                sizes.update(tuple(image.shape[1:]) for image in images)
                if len(sizes) > 1:
                    one, other = sorted(sizes)[:2]
                    raise InputError(f'datasets give images of {one} and of {other}: all must have one size')
                batch = torch.stack(images).to(next(self.encoder.parameters()).device)
                views = [batch, batch.flip(-1)] if self.mirror else [batch]
                encoded = torch.stack([self.encoder.raw(view) for view in views], dim=1).flatten(0, 1)
                latents.append(encoded.half().cpu())
                bar.update(len(images))
        return torch.cat(latents)

    @torch.no_grad()
    def _write(self) -> None:
        from safetensors.torch import save_file

        remove_abandoned(self.cache.parent)
        self.encoder.to(get_device())
        state, numpy_state = random.getstate(), np.random.get_state()
        values = self._encode()
        random.setstate(state)
        np.random.set_state(numpy_state)
        self.encoder.cpu()
        std, mean = torch.std_mean(values.double(), dim=(0, 2, 3), correction=0)
        if not torch.isfinite(values).all() or not (std > 0).all():
            raise InputError(f'{self.cache}: latents are not finite in float16, or a channel of them is constant')
        content = {'latents': values, 'mean': mean, 'std': std}
        with atomic_path(self.cache) as temporary:
            save_file(content, temporary, {'key': self.key, 'sha256': checksum(content)})
        print_log(f'{len(values)} latents of {tuple(values.shape[1:])} are in {self.cache}', logger='current')


def find_pipelines(config: Any) -> list[Any]:
    """Every ``pipeline`` in the config of a data set, wrapped ones too, and nothing else of it."""
    if isinstance(config, (list, tuple)):
        return [pipeline for item in config for pipeline in find_pipelines(item)]
    if not isinstance(config, dict):
        return []
    own = [config['pipeline']] if 'pipeline' in config else []
    return own + [pipeline for key, value in config.items() if key != 'pipeline' for pipeline in find_pipelines(value)]


def checksum(content: dict[str, Tensor]) -> str:
    """SHA-256 of the bytes of tensors on the CPU, in the order of their names."""
    digest = hashlib.sha256()
    for _, values in sorted(content.items()):
        digest.update(values.numpy().data)
    return digest.hexdigest()


def read_latents(path: Path, key: str) -> dict[str, Tensor] | None:
    """Reads a file of latents.

    Args:
        path: Of the file.
        key: What it must have been made for.

    Returns:
        ``latents``, and their ``mean`` and ``std`` per channel; None where there is no such file, or it cannot be used,
        which the log says.
    """
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework='pt') as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in ('latents', 'mean', 'std')}
        reason = None
        if metadata.get('key') != key:
            reason = 'it was made by another encoder, or of other files or transforms'
        elif metadata.get('sha256') != checksum(content):
            reason = 'its checksum is wrong'
    except Exception as error:  # safetensors raises its own and torch's
        reason = one_line(error)
    if reason is not None:
        print_log(f'{path} is made anew: {reason}', logger='current', level=logging.WARNING)
        return None
    return content

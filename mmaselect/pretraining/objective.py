"""What all trainings of a diffusion transformer share: the network, the noise, the loss and the export."""

from __future__ import annotations

import json
from abc import abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.dist import get_rank
from mmengine.model import BaseModel
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.families.dit import FREQUENCY_SHIFT, DiT
from mmaselect.diffusion.latent import Autoencoder, PixelEncoder
from mmaselect.diffusion.loading import WEIGHTS, parse_dtype
from mmaselect.diffusion.noise import seeded_generator
from mmaselect.errors import InputError, check_count
from mmaselect.files import atomic_path, write_json


class Objective(BaseModel):
    """Trains a diffusion transformer without labels to undo noise, by mean squared error.

    Noise depends on the seed, the step and the rank alone, so that a run that was resumed ends as one that was not.

    Args:
        transformer: Arguments of diffusers' ``DiTTransformer2DModel``. The null class is the only one that is shown.
        data_preprocessor: As in every mmengine model. It must deliver images in [-1, 1] to a model of pixels, which
            has 1 or 3 ``in_channels``; :class:`LatentDataset` delivers latents as they are.
        autocast: Compute the network in this dtype, ``'bfloat16'`` or ``'float16'``, weights and loss in float32.
            mmengine's ``AmpOptimWrapper`` does the same on accelerators, but refuses CPUs.
        seed: Of the noise.

    Raises:
        InputError: If ``autocast`` is not a dtype, or ``seed`` no whole number.
    """

    family: ClassVar[type[DiT]]

    def __init__(
        self,
        transformer: dict[str, Any],
        data_preprocessor: dict[str, Any] | None = None,
        autocast: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.autocast = None if autocast is None else parse_dtype(autocast)
        self.seed = check_count(seed, 'seed', 0)
        self.frequency_shift = transformer.get(FREQUENCY_SHIFT)
        self.transformer = self.family.build(self.family.complete(transformer))
        # In checkpoints: the noise of the next step depends on it.
        self.register_buffer('step', torch.zeros((), dtype=torch.long))

    @abstractmethod
    def noised(self, data: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noises data, each item to a time of its own.

        Args:
            data: (B, C, H, W).
            noise: Standard normal, of the same shape.
            generator: On the CPU, for the times.

        Returns:
            The noisy data, the times (B,) as the network is told, and what it shall predict.
        """

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'loss') -> dict[str, Tensor]:
        """Computes the loss.

        Args:
            inputs: Images, (B, 3, H, W) in [-1, 1], or latents, (B, C, H, W).
            data_samples: Ignored: no labels are used.
            mode: Only ``'loss'``.

        Returns:
            ``{'loss': ...}``.

        Raises:
            InputError: If the data do not have the channels of the model.
        """
        if mode != 'loss':
            raise NotImplementedError(f'{type(self).__name__} is only trained; mode={mode!r} is not supported')
        data = self._data(inputs)
        # The same at the same step of a run, on every device; ranks draw their own.
        generator = seeded_generator(self.seed, int(self.step), get_rank())
        if self.training:
            self.step += 1
        noise = torch.randn(data.shape, generator=generator).to(data.device)
        noisy, time, target = self.noised(data, noise, generator)
        labels = torch.full((len(data),), self.transformer.config.num_embeds_ada_norm, device=data.device)
        with torch.autocast(data.device.type, self.autocast) if self.autocast else nullcontext():
            predicted = self.transformer(noisy, timestep=time, class_labels=labels).sample
        return {'loss': F.mse_loss(predicted.float(), target)}

    def _data(self, inputs: Tensor) -> Tensor:
        channels = self.transformer.config.in_channels
        if inputs.shape[1] == channels:
            return inputs
        if inputs.shape[1] != 3 or channels != 1:
            raise InputError(
                f'in_channels={channels} does not fit data of {inputs.shape[1]} channels: give the channels of the '
                'latent; of pixels 3, or 1 for grey ones'
            )
        return PixelEncoder(channels)(inputs)

    def export(self, folder: str | Path, encoder: Autoencoder | None = None) -> Path:
        """Writes the network as a diffusers folder that ``pretrained=`` loads.

        Args:
            folder: Where ``transformer/`` goes. The weight file replaces an older one in a single step.
            encoder: Of the latents that it was trained on, which goes into ``vae/``. Without it the model is loaded
                with ``latent='pixels'``.

        Returns:
            The safetensors file of the network.
        """
        # What save_pretrained writes; but that leaves half of it behind where it is killed.
        config = json.loads(self.transformer.to_json_string())
        if self.frequency_shift is not None:
            # Not a field of diffusers' class, which does not know of it.
            config[FREQUENCY_SHIFT] = self.frequency_shift
        if encoder is not None and encoder.latents_mean is not None and encoder.latents_std is not None:
            statistics = {
                'latents_mean': encoder.latents_mean.flatten().tolist(),
                'latents_std': encoder.latents_std.flatten().tolist(),
                # The data set standardises what the encoder itself gives.
                'scaling_factor': 1.0,
            }
            write_model(Path(folder) / 'vae', encoder, {**encoder.config, **statistics})
        return write_model(Path(folder) / 'transformer', self.transformer, config)


def write_model(folder: Path, module: torch.nn.Module, config: dict[str, Any]) -> Path:
    """Writes weights and ``config.json`` of one model, each file whole or not at all; returns the file of weights."""
    from safetensors.torch import save_file

    file = folder / f'{WEIGHTS}.safetensors'
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, {'format': 'pt'})
    write_json(folder / 'config.json', config)
    return file

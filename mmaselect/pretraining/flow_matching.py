"""Flow matching of a SiT on pixels, as a model that an ordinary mmengine runner trains."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.families import SiT
from mmaselect.diffusion.families.dit import FREQUENCY_SHIFT
from mmaselect.diffusion.latent import PixelEncoder
from mmaselect.diffusion.loading import WEIGHTS, parse_dtype
from mmaselect.files import atomic_path, write_json


@MODELS.register_module()
class FlowMatching(BaseModel):
    """Trains a class-free SiT by flow matching (arXiv 2210.02747, the linear path of arXiv 2401.08740).

    With data ``x``, noise ``e`` and SiT's time ``u`` (1 at the data), the network sees ``u x + (1 - u) e`` and learns
    the velocity ``x - e`` by mean squared error. ``u`` is the logistic of a standard normal, which spends its steps
    where the task is neither trivial nor hopeless (arXiv 2403.03206, section 3.1).

    Args:
        transformer: Arguments of diffusers' ``DiTTransformer2DModel``; 1 or 3 ``in_channels``. The null class is the
            only one that is ever shown.
        data_preprocessor: As in every mmengine model; it must deliver images in [-1, 1].
        autocast: Compute the network in this dtype, ``'bfloat16'`` or ``'float16'``, weights and loss in float32.
            mmengine's ``AmpOptimWrapper`` does the same on accelerators, but refuses CPUs.

    Raises:
        InputError: If ``autocast`` is not a dtype.
    """

    def __init__(
        self,
        transformer: dict[str, Any],
        data_preprocessor: dict[str, Any] | None = None,
        autocast: str | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.autocast = None if autocast is None else parse_dtype(autocast)
        self.frequency_shift = transformer.get(FREQUENCY_SHIFT)
        self.transformer = SiT.build(SiT.complete(transformer))
        self.encoder = PixelEncoder(self.transformer.config.in_channels)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'loss') -> dict[str, Tensor]:
        """Computes the loss.

        Args:
            inputs: Images, (B, 3, H, W) in [-1, 1].
            data_samples: Ignored: no labels are used.
            mode: Only ``'loss'``.

        Returns:
            ``{'loss': ...}``, the mean squared error of the velocity.
        """
        if mode != 'loss':
            raise NotImplementedError(f'FlowMatching is only trained; mode={mode!r} is not supported')
        data = self.encoder(inputs)
        noise = torch.randn_like(data)
        time = torch.randn(len(data), device=data.device).sigmoid()
        mix = time.view(-1, 1, 1, 1)
        labels = torch.full((len(data),), self.transformer.config.num_embeds_ada_norm, device=data.device)
        noisy = mix * data + (1 - mix) * noise
        with torch.autocast(data.device.type, self.autocast) if self.autocast else nullcontext():
            velocity = self.transformer(noisy, timestep=time, class_labels=labels).sample
        return {'loss': F.mse_loss(velocity.float(), data - noise)}

    def export(self, folder: str | Path) -> Path:
        """Writes the network as a diffusers folder that ``ASelectDiT`` loads with ``latent='pixels'``.

        Args:
            folder: Where ``transformer/`` goes. The weight file replaces an older one in a single step.

        Returns:
            The safetensors file.
        """
        from safetensors.torch import save_file

        target = Path(folder) / 'transformer'
        file = target / f'{WEIGHTS}.safetensors'
        # What save_pretrained writes; but that leaves half of it behind where it is killed.
        config = json.loads(self.transformer.to_json_string())
        if self.frequency_shift is not None:
            # Not a field of diffusers' class, which does not know of it.
            config[FREQUENCY_SHIFT] = self.frequency_shift
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.transformer.state_dict().items()}
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, {'format': 'pt'})
        write_json(target / 'config.json', config)
        return file

"""Z-Image (arXiv 2511.22699, one stream of tokens). On diffusers' ``ZImageTransformer2DModel``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmaselect.diffusion.family import Family, block_sites
from mmaselect.diffusion.network import Site


class ZImage(Family):
    """Z-Image and its Turbo under one constant prompt; the blocks that refine image or prompt alone are not counted."""

    name = 'ZImage'
    least_diffusers = '0.36'
    class_names = ('ZImageTransformer2DModel',)
    architectures = {'z-image': {}}
    sites = block_sites('attention')[0]
    normalised_sites = {name: Site(f'attention.norm_{name[0]}', merge=(2, 3)) for name in ('query', 'key')}
    image_first = True
    # It handles images one by one, which takes its time.
    dry_batch = 31
    # What the pipeline's template makes of the empty text.
    prompt_tokens = 8

    def time(self, timestep: float) -> float:
        """What the network is told: the share of the image, in [0, 1]."""
        return 1 - self.process.network_timestep(timestep) / 1000

    @classmethod
    def blocks(cls, config: Any) -> list[str]:
        """Those of image and prompt together."""
        return [f'layers.{number}' for number in range(config['n_layers'])]

    @classmethod
    def multiple(cls, config: Any) -> int:
        """A token is 2x2 latent pixels."""
        return 2

    @classmethod
    def side(cls, config: Any) -> int:
        """1024 image pixels."""
        return 128

    @classmethod
    def prompt_widths(cls, config: Any) -> dict[str, int]:
        """Tokens of Qwen3."""
        return {'prompt_embeds': config['cap_feat_dim']}

    @classmethod
    def arguments(cls, config: Any, latent: Tensor, time: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """It takes images one by one, as films of one frame."""
        frames = list(latent.unsqueeze(2).unbind(0))
        return {'x': frames, 't': time, **cls.condition(config, latent, prompt)}

    @classmethod
    def condition(cls, config: Any, latent: Tensor, prompt: dict[str, Tensor]) -> dict[str, Any]:
        """The prompt, for every image."""
        return {'cap_feats': [prompt['prompt_embeds'][0]] * len(latent)}

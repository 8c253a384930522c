"""DiT (arXiv 2212.09748): class-conditional, DDPM noise, AdaLN-Zero. On diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.family import (
    PROJECTIONS,
    Constants,
    DiffusersModule,
    Family,
    merge_heads,
    modulate,
    modulation,
    normalise,
    project,
    sincos_positions,
    unused_projections,
)
from mmaselect.diffusion.noise import DDPM, ForwardProcess
from mmaselect.errors import InputError

#: Key that ``tools/model_converters/dit_to_diffusers.py`` adds to ``config.json``; see ``DiT.build``.
FREQUENCY_SHIFT = 'timestep_freq_shift'


def architecture(layers: int, heads: int, head_dim: int, sample_size: int, patch_size: int = 2) -> dict[str, Any]:
    """Arguments of ``DiTTransformer2DModel`` for one row of the paper's table 1."""
    return dict(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        sample_size=sample_size,
        patch_size=patch_size,
        num_embeds_ada_norm=1000,
    )


class DiT(Family):
    """DiT under the null class.

    Every block of diffusers' model embeds timestep and class by itself. Both are the same for all images, so each block
    is modulated by vectors that are computed once per timestep.
    """

    name = 'DiT'
    class_names: ClassVar[tuple[str, ...]] = ('DiTTransformer2DModel', 'Transformer2DModel')
    architectures = {
        'dit-s/2-256': architecture(12, 6, 64, 32),
        'dit-b/2-256': architecture(12, 12, 64, 32),
        'dit-l/2-256': architecture(24, 16, 64, 32),
        'dit-xl/2-256': architecture(28, 16, 72, 32),
        'dit-xl/2-512': architecture(28, 16, 72, 64),
    }

    @classmethod
    def model_class(cls) -> type[DiffusersModule]:
        """Diffusers' DiT."""
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel

    @classmethod
    def build(cls, config: dict[str, Any]) -> DiffusersModule:
        """Builds the model of a ``config.json``.

        Args:
            config: Arguments of ``DiTTransformer2DModel``, and optionally ``timestep_freq_shift``: diffusers spaces
                the 128 frequencies of the timestep embedding over 127 steps (1, the default), the original DiT and
                SiT code over 128 (0). A folder converted from an original checkpoint says 0, since that is what its
                weights were trained with.

        Returns:
            The diffusers model.

        Raises:
            InputError: If the config is of another kind of model.
        """
        if config.get('norm_type', 'ada_norm_zero') != 'ada_norm_zero':
            raise InputError(f'norm_type={config["norm_type"]!r} is not a {cls.name}: expected ada_norm_zero')
        model = super().build(config)
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = config.get(FREQUENCY_SHIFT, 1)
        return model

    @classmethod
    def known_fields(cls) -> list[str]:
        """And our own."""
        return [*super().known_fields(), FREQUENCY_SHIFT]

    @classmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float) -> ForwardProcess:
        """DDPM with the scheduler's own ``abar``; a resolution shift is not defined for it."""
        if shift != 1:
            raise InputError(f'shift={shift!r} is not valid for {cls.name}: only rectified flow has a resolution shift')
        return DDPM.from_scheduler_config(scheduler)

    @classmethod
    def final_layers(cls) -> Iterable[str]:
        """The output layers."""
        return ('norm_out', 'proj_out_1', 'proj_out_2')

    @classmethod
    def unused(cls, block: DiffusersModule, components: frozenset[str], normalised: bool) -> Iterable[str]:
        """What the last block does not need, from the back to the front."""
        if 'output' in components:
            return []
        behind = ['norm3', 'ff']
        if 'attention' not in components:
            behind += ['attn1.to_out', *unused_projections('attn1', components, normalised)]
        return behind

    @classmethod
    def restore_buffers(cls, transformer: DiffusersModule) -> None:
        """Recomputes the position table, which diffusers does not save for DiT."""
        table = sincos_positions(transformer.pos_embed)
        transformer.pos_embed.register_buffer('pos_embed', table, persistent=False)

    def time(self, timestep: float) -> float:
        """What the network is told for a user's timestep: the index of the trained step."""
        return self.process.network_timestep(timestep)

    def prepare(self, timestep: float) -> Constants:
        """The six modulation vectors of every block: shift, scale, gate, and those of its feed-forward."""
        weight = self.transformer.pos_embed.proj.weight
        time = torch.tensor([self.time(timestep)], device=weight.device)
        null_class = torch.tensor([self.transformer.config.num_embeds_ada_norm], device=weight.device)
        return Constants(
            [
                modulation(block.norm1, block.norm1.emb(time, null_class, hidden_dtype=weight.dtype))
                for block in self.transformer.transformer_blocks
            ]
        )

    def embed(self, latent: Tensor, constants: Constants) -> tuple[Tensor, None]:
        """Patches plus positions."""
        return self.transformer.pos_embed(latent), None

    def run_block(
        self,
        block: DiffusersModule,
        constants: tuple[Tensor, ...],
        tokens: Tensor,
        context: None,
        wanted: tuple[str, ...],
        last: bool,
    ) -> tuple[Tensor, None, dict[str, Tensor]]:
        """Diffusers' ``BasicTransformerBlock`` with ``ada_norm_zero``, readable on the way."""
        attends = not last or 'attention' in wanted or 'output' in wanted
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = constants
        normed = modulate(block.norm1.norm, tokens, shift, scale)
        projections = project(block.attn1, normed, PROJECTIONS if attends else wanted)
        ready = normalise(block.attn1, projections) if attends or self.normalised else {}
        read = self._readable(projections, ready)
        read['modulated'] = normed
        if attends:
            attended = F.scaled_dot_product_attention(ready['query'], ready['key'], ready['value'])
            attended = block.attn1.to_out[0](merge_heads(attended))
            read['attention'] = attended
        if not last or 'output' in wanted:
            tokens = gate.unsqueeze(1) * attended + tokens
            tokens = gate_mlp.unsqueeze(1) * block.ff(modulate(block.norm3, tokens, shift_mlp, scale_mlp)) + tokens
            read['output'] = tokens
        return tokens, context, {name: read[name] for name in wanted}

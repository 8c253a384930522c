"""Stable Diffusion 3 and 3.5 (MM-DiT, arXiv 2403.03206). On diffusers' ``SD3Transformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmaselect.diffusion.family import (
    PROJECTIONS,
    Constants,
    DiffusersModule,
    Family,
    Tap,
    merge_heads,
    modulate,
    modulation,
    normalise,
    project,
    scale_and_shift,
    sincos_positions,
    split_heads,
    unused_projections,
)
from mmaselect.diffusion.noise import ForwardProcess, RectifiedFlow
from mmaselect.errors import InputError


def architecture(layers: int, pos_embed_max_size: int, dual: int = 0, qk_norm: str | None = None) -> dict[str, Any]:
    """Arguments of ``SD3Transformer2DModel``; MM-DiT ties its width to its depth (64 channels per layer)."""
    return dict(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        pos_embed_max_size=pos_embed_max_size,
        dual_attention_layers=tuple(range(dual)),
        qk_norm=qk_norm,
    )


class BlockConstants(NamedTuple):
    """What a block of an MM-DiT reads that depends on timestep and prompt alone.

    Attributes:
        image: Modulation vectors of the image stream: 6, or 9 in a block with dual attention, each (1, D).
        prompt: Those of the prompt stream: 6, or scale and shift where it ends; none where nothing reads it.
        added: The first block's query, key and value of the prompt, (1, heads, L, d); None for all others, whose prompt
            stream depends on the image.
    """

    image: tuple[Tensor, ...]
    prompt: tuple[Tensor, ...]
    added: dict[str, Tensor] | None = None


class SD3(Family):
    """SD3-medium, SD3.5-medium (dual attention in its first 13 blocks) and SD3.5-large under one constant prompt.

    Args:
        transformer: Pruned ``SD3Transformer2DModel``.
        taps: What to read. In a block with dual attention, query, key, value and attention are those of the joint
            attention, which SD3.5-medium shares with its siblings.
        process: Rectified flow.
        normalised: See :class:`Family`.
        prompt: ``prompt_embeds`` (1, L, joint_attention_dim) and ``pooled_prompt_embeds`` (1, pooled_projection_dim).

    Raises:
        InputError: If the prompt's embedding does not fit the model.
    """

    name = 'SD3'
    class_names = ('SD3Transformer2DModel',)
    uses_prompt = True
    architectures = {
        'sd3-medium': architecture(24, 192),
        'sd3.5-medium': architecture(24, 384, dual=13, qk_norm='rms_norm'),
        'sd3.5-large': architecture(38, 192, qk_norm='rms_norm'),
    }

    def __init__(
        self,
        transformer: DiffusersModule,
        taps: tuple[Tap, ...],
        process: ForwardProcess,
        normalised: bool = False,
        prompt: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(transformer, taps, process, normalised)
        if prompt is None:
            raise InputError('prompt=None: SD3 needs the embedding of its constant prompt')
        config = transformer.config
        shapes = {'prompt_embeds': config.joint_attention_dim, 'pooled_prompt_embeds': config.pooled_projection_dim}
        for name, width in shapes.items():
            if prompt[name].shape[-1] != width:
                raise InputError(f'{name} is {prompt[name].shape[-1]} wide; this model expects {width}')
            self.register_buffer(name, prompt[name], persistent=False)

    @classmethod
    def model_class(cls) -> type[DiffusersModule]:
        """Diffusers' MM-DiT."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @classmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float) -> ForwardProcess:
        """Rectified flow; the scheduler's own sampling shift is not applied, only the one the config asks for."""
        return RectifiedFlow(shift)

    @classmethod
    def make_buffers(cls, transformer: DiffusersModule) -> None:
        """The position table, which diffusers saves for SD3."""
        transformer.pos_embed.register_buffer('pos_embed', sincos_positions(transformer.pos_embed), persistent=True)

    @classmethod
    def final_layers(cls) -> Iterable[str]:
        """The output layers."""
        return ('norm_out', 'proj_out')

    @classmethod
    def unused(cls, block: DiffusersModule, components: frozenset[str], normalised: bool) -> Iterable[str]:
        """What the last block does not need: the prompt's way out always, then from the back to the front."""
        context_way_out = ['norm2_context', 'ff_context', 'attn.to_add_out', 'attn.add_q_proj', 'attn.norm_added_q']
        if 'output' in components:
            return context_way_out
        behind = [*context_way_out, 'attn2', 'norm2', 'ff']
        if 'attention' not in components:
            behind += ['attn.to_out', 'attn.add_k_proj', 'attn.add_v_proj', 'attn.norm_added_k', 'norm1_context']
            behind += unused_projections('attn', components, normalised)
        return behind

    def prepare(self, timestep: float) -> Constants:
        """The embedded prompt, every block's modulation, and what the first block makes of the prompt."""
        model = self.transformer
        time = torch.tensor([self.process.network_timestep(timestep)], device=next(self.parameters()).device)
        embedding = model.time_text_embed(time, self.pooled_prompt_embeds)
        prompt = model.context_embedder(self.prompt_embeds)
        blocks = []
        for block in model.transformer_blocks:
            read = block.norm1_context is not None
            blocks.append(
                BlockConstants(
                    modulation(block.norm1, embedding), modulation(block.norm1_context, embedding) if read else ()
                )
            )
        first = model.transformer_blocks[0]
        if blocks[0].prompt:
            normed = self._norm_prompt(first, blocks[0], prompt)
            blocks[0] = blocks[0]._replace(added=self._project_prompt(first.attn, normed))
        return Constants(blocks, prompt)

    def embed(self, latent: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
        """Patches plus the centre crop of the position table, and the prompt's tokens (B, L, D)."""
        tokens = self.transformer.pos_embed(latent).contiguous()
        return tokens, constants.context.expand(len(latent), -1, -1)

    def run_block(
        self,
        block: DiffusersModule,
        constants: BlockConstants,
        tokens: Tensor,
        context: Tensor,
        wanted: tuple[str, ...],
        last: bool,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Diffusers' ``JointTransformerBlock``, readable on the way."""
        attends = not last or 'attention' in wanted or 'output' in wanted
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = constants.image
        plain = block.norm1.norm(tokens)
        normed = scale_and_shift(plain, shift, scale)
        projections = project(block.attn, normed, PROJECTIONS if attends else wanted)
        ready = normalise(block.attn, projections) if attends or self.normalised else {}
        read = self._readable(projections, ready)
        read['modulated'] = normed
        if attends:
            added = constants.added or self._project_prompt(block.attn, self._norm_prompt(block, constants, context))
            attended, answer = self._attend_jointly(block.attn, ready, added, last)
            read['attention'] = attended
        if not last or 'output' in wanted:
            tokens = tokens + gate.unsqueeze(1) * attended
            if dual:
                shift2, scale2, gate2 = dual
                normed2 = scale_and_shift(plain, shift2, scale2)
                tokens = tokens + gate2.unsqueeze(1) * self._attend(block.attn2, normed2)
            tokens = tokens + gate_mlp.unsqueeze(1) * block.ff(modulate(block.norm2, tokens, shift_mlp, scale_mlp))
            read['output'] = tokens
        if not last:
            _, _, gate, shift_mlp, scale_mlp, gate_mlp = constants.prompt
            context = context + gate.unsqueeze(1) * answer
            context = context + gate_mlp.unsqueeze(1) * block.ff_context(
                modulate(block.norm2_context, context, shift_mlp, scale_mlp)
            )
        return tokens, context, {name: read[name] for name in wanted}

    @staticmethod
    def _norm_prompt(block: DiffusersModule, constants: BlockConstants, prompt: Tensor) -> Tensor:
        # Where the prompt's stream ends, diffusers' layer has scale and shift in this order, and no gates.
        shift, scale = constants.prompt[1::-1] if block.context_pre_only else constants.prompt[:2]
        return modulate(block.norm1_context.norm, prompt, shift, scale)

    @staticmethod
    def _project_prompt(attention: DiffusersModule, prompt: Tensor) -> dict[str, Tensor]:
        """Query (where the prompt attends), key and value of the normed prompt, ready to attend, (B, heads, L, d)."""
        layers = {
            'query': (attention.add_q_proj, attention.norm_added_q),
            'key': (attention.add_k_proj, attention.norm_added_k),
            'value': (attention.add_v_proj, None),
        }
        ready = {}
        for name, (layer, norm) in layers.items():
            if layer is not None:
                split = split_heads(layer(prompt), attention.heads)
                ready[name] = split if norm is None else norm(split)
        return ready

    @staticmethod
    def _attend(attention: DiffusersModule, tokens: Tensor) -> Tensor:
        ready = normalise(attention, project(attention, tokens, PROJECTIONS))
        return attention.to_out[0](
            merge_heads(F.scaled_dot_product_attention(ready['query'], ready['key'], ready['value']))
        )

    @staticmethod
    def _attend_jointly(
        attention: DiffusersModule, image: dict[str, Tensor], prompt: dict[str, Tensor], last: bool
    ) -> tuple[Tensor, Any]:
        batch, _, num_tokens, _ = image['query'].shape
        # Nothing runs behind the last block, so there the prompt is attended to but does not attend.
        query, key, value = (
            image[name]
            if last and name == 'query'
            else torch.cat([image[name], prompt[name].expand(batch, -1, -1, -1)], dim=2)
            for name in PROJECTIONS
        )
        attended = merge_heads(F.scaled_dot_product_attention(query, key, value))
        out = attention.to_out[0](attended[:, :num_tokens])
        return out, None if last else attention.to_add_out(attended[:, num_tokens:])

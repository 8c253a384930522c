"""Stable Diffusion 3 and 3.5 (MM-DiT, arXiv 2403.03206). On diffusers' ``SD3Transformer2DModel``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmaselect.diffusion.family import (
    PROJECTIONS,
    Family,
    Tap,
    merge_heads,
    modulate,
    normalise,
    project,
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


class Stream(NamedTuple):
    """What the blocks of an MM-DiT share beside the image tokens.

    Attributes:
        embedding: Timestep and pooled prompt, (1, D): the same for every image.
        context: Prompt tokens, (B, L, D).
    """

    embedding: Tensor
    context: Tensor


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
        transformer: nn.Module,
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
    def model_class(cls) -> type[nn.Module]:
        """Diffusers' MM-DiT."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @classmethod
    def make_process(cls, scheduler: dict[str, Any], shift: float) -> ForwardProcess:
        """Rectified flow; the scheduler's own sampling shift is not applied, only the one the config asks for."""
        return RectifiedFlow(shift)

    @classmethod
    def make_buffers(cls, transformer: nn.Module) -> None:
        """The position table, which diffusers saves for SD3."""
        transformer.pos_embed.register_buffer('pos_embed', sincos_positions(transformer.pos_embed), persistent=True)

    @classmethod
    def final_layers(cls) -> Iterable[str]:
        """The output layers."""
        return ('norm_out', 'proj_out')

    @classmethod
    def unused(cls, block: nn.Module, components: frozenset[str], normalised: bool) -> Iterable[str]:
        """What the last block does not need: the prompt's way out always, then from the back to the front."""
        context_way_out = ['norm2_context', 'ff_context', 'attn.to_add_out', 'attn.add_q_proj', 'attn.norm_added_q']
        if 'output' in components:
            return context_way_out
        behind = [*context_way_out, 'attn2', 'norm2', 'ff']
        if 'attention' not in components:
            behind += ['attn.to_out', 'attn.add_k_proj', 'attn.add_v_proj', 'attn.norm_added_k', 'norm1_context']
            behind += unused_projections('attn', components, normalised)
        return behind

    def embed(self, latent: Tensor, timestep: float) -> tuple[Tensor, Stream]:
        """Patches plus the centre crop of the position table, and timestep and prompt for the blocks."""
        model = self.transformer
        time = torch.tensor([self.process.network_timestep(timestep)], device=latent.device)
        context = model.context_embedder(self.prompt_embeds)
        stream = Stream(
            embedding=model.time_text_embed(time, self.pooled_prompt_embeds),
            context=context.expand(len(latent), -1, -1),
        )
        return model.pos_embed(latent).contiguous(), stream

    def run_block(
        self, block: nn.Module, tokens: Tensor, context: Stream, wanted: frozenset[str], last: bool
    ) -> tuple[Tensor, Stream, dict[str, Tensor]]:
        """Diffusers' ``JointTransformerBlock``, readable on the way."""
        attends = not last or bool(wanted & {'attention', 'output'})
        embedding = context.embedding
        normed, gate, shift_mlp, scale_mlp, gate_mlp, *dual = block.norm1(tokens, emb=embedding)
        projections = project(block.attn, normed, PROJECTIONS if attends else wanted)
        ready = normalise(block.attn, projections) if attends or self.normalised else {}
        read = self._readable(projections, ready)
        read['modulated'] = normed
        if attends:
            prompt, *prompt_modulation = self._norm_context(block, context)
            attended, attended_prompt = self._attend_jointly(block.attn, ready, prompt, last)
            read['attention'] = attended
        if not last or 'output' in wanted:
            tokens = tokens + gate.unsqueeze(1) * attended
            if dual:
                normed2, gate2 = dual
                tokens = tokens + gate2.unsqueeze(1) * self._attend(block.attn2, normed2)
            tokens = tokens + gate_mlp.unsqueeze(1) * block.ff(modulate(block.norm2, tokens, shift_mlp, scale_mlp))
            read['output'] = tokens
        if not last:
            gate, shift_mlp, scale_mlp, gate_mlp = prompt_modulation
            prompt = context.context + gate.unsqueeze(1) * attended_prompt
            prompt = prompt + gate_mlp.unsqueeze(1) * block.ff_context(
                modulate(block.norm2_context, prompt, shift_mlp, scale_mlp)
            )
            context = context._replace(context=prompt)
        return tokens, context, {name: read[name] for name in wanted}

    @staticmethod
    def _norm_context(block: nn.Module, stream: Stream) -> tuple[Tensor, ...]:
        if block.context_pre_only:
            return (block.norm1_context(stream.context, stream.embedding),)
        return block.norm1_context(stream.context, emb=stream.embedding)

    @staticmethod
    def _attend(attention: nn.Module, tokens: Tensor) -> Tensor:
        ready = normalise(attention, project(attention, tokens, PROJECTIONS))
        return attention.to_out[0](
            merge_heads(F.scaled_dot_product_attention(ready['query'], ready['key'], ready['value']))
        )

    @staticmethod
    def _attend_jointly(
        attention: nn.Module, image: dict[str, Tensor], prompt: Tensor, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        def added(layer: nn.Module, norm: nn.Module | None) -> Tensor:
            split = split_heads(layer(prompt), attention.heads)
            return split if norm is None else norm(split)

        query = image['query']
        key = torch.cat([image['key'], added(attention.add_k_proj, attention.norm_added_k)], dim=2)
        value = torch.cat([image['value'], added(attention.add_v_proj, None)], dim=2)
        num_tokens = query.shape[2]
        # Nothing runs behind the last block, so there the prompt is attended to but does not attend.
        if not last:
            query = torch.cat([query, added(attention.add_q_proj, attention.norm_added_q)], dim=2)
        attended = merge_heads(F.scaled_dot_product_attention(query, key, value))
        out = attention.to_out[0](attended[:, :num_tokens])
        return out, None if last else attention.to_add_out(attended[:, num_tokens:])

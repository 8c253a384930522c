"""Models in the layouts of their original code, written from diffusers' names by hand: the way back of a conversion."""

from __future__ import annotations

import re

import torch

RESNET = {
    'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1', 'norm2': 'out_layers.0',
    'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection',
}  # fmt: skip


def rename(name, table):
    """Replaces the stem of a name by the first entry that it begins with."""
    for new, old in table.items():
        if name.startswith(f'{new}.'):
            return f'{old}.{name.removeprefix(f"{new}.")}'
    raise KeyError(name)


def swap(value):
    """Scale and shift change places."""
    return torch.cat(value.chunk(2)[::-1])


def fused(state, parts):
    """Three tensors become one."""
    return torch.cat([state[part] for part in parts])


def sd3(state):
    """MM-DiT of Stability's code."""
    top = {
        'pos_embed.proj': 'x_embedder.proj', 'time_text_embed.timestep_embedder.linear_1': 't_embedder.mlp.0',
        'time_text_embed.timestep_embedder.linear_2': 't_embedder.mlp.2',
        'time_text_embed.text_embedder.linear_1': 'y_embedder.mlp.0',
        'time_text_embed.text_embedder.linear_2': 'y_embedder.mlp.2', 'context_embedder': 'context_embedder',
        'proj_out': 'final_layer.linear',
    }  # fmt: skip
    block = {
        'attn.to_out.0': 'x_block.attn.proj', 'attn.to_add_out': 'context_block.attn.proj',
        'attn.norm_q': 'x_block.attn.ln_q', 'attn.norm_k': 'x_block.attn.ln_k',
        'attn.norm_added_q': 'context_block.attn.ln_q', 'attn.norm_added_k': 'context_block.attn.ln_k',
        'attn2.to_out.0': 'x_block.attn2.proj', 'attn2.norm_q': 'x_block.attn2.ln_q',
        'attn2.norm_k': 'x_block.attn2.ln_k', 'norm1.linear': 'x_block.adaLN_modulation.1',
        'norm1_context.linear': 'context_block.adaLN_modulation.1', 'ff.net.0.proj': 'x_block.mlp.fc1',
        'ff.net.2': 'x_block.mlp.fc2', 'ff_context.net.0.proj': 'context_block.mlp.fc1',
        'ff_context.net.2': 'context_block.mlp.fc2',
    }  # fmt: skip
    last = max(int(name.split('.')[1]) for name in state if name.startswith('transformer_blocks.'))
    out = {}
    for name, value in state.items():
        if name == 'pos_embed.pos_embed':
            out['pos_embed'] = value
        elif name.startswith('norm_out.'):
            out[name.replace('norm_out.linear', 'final_layer.adaLN_modulation.1')] = swap(value)
        elif not name.startswith('transformer_blocks.'):
            out[rename(name, top)] = value
        else:
            _, number, inner = name.split('.', 2)
            found = re.fullmatch(r'(attn2?)\.(to|add)_([qkv])(_proj)?\.(\w+)', inner)
            if found:
                side = 'context_block' if found[2] == 'add' else 'x_block'
                parts = [name.replace(f'{found[2]}_{found[3]}', f'{found[2]}_{letter}') for letter in 'qkv']
                out[f'joint_blocks.{number}.{side}.{found[1]}.qkv.{found[5]}'] = fused(state, parts)
                continue
            # The prompt's last norm is one of diffusers' that has scale before shift.
            swapped = inner.startswith('norm1_context') and int(number) == last
            out[f'joint_blocks.{number}.{rename(inner, block)}'] = swap(value) if swapped else value
    return out


def unet(state, layers):
    """The U-Net of CompVis' and Stability's code.

    Args:
        state: Of diffusers' model.
        layers: ``layers_per_block``.
    """
    top = {
        'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2',
        'add_embedding.linear_1': 'label_emb.0.0', 'add_embedding.linear_2': 'label_emb.0.2',
        'conv_in': 'input_blocks.0.0', 'conv_norm_out': 'out.0', 'conv_out': 'out.2',
    }  # fmt: skip
    out = {}
    for name, value in state.items():
        found = re.fullmatch(r'(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(\w+?)s\.(\d+)\.(.*)', name)
        if not found:
            out[rename(name, top)] = value
            continue
        block, kind, number, inner = found.groups()
        number, level = int(number), int(block.split('.')[1]) if '.' in block else 0
        inner = rename(inner, RESNET) if kind == 'resnet' else inner
        if block == 'mid_block':
            path = f'middle_block.{2 * number if kind == "resnet" else 1}'
        elif kind == 'downsampler':
            path, inner = f'input_blocks.{(level + 1) * (layers + 1)}.0', inner.replace('conv.', 'op.')
        elif kind == 'upsampler':
            last = level * (layers + 1) + layers
            attends = any(key.startswith(f'{block}.attentions') for key in state)
            path = f'output_blocks.{last}.{2 if attends else 1}'
        else:
            first, place = (1, 'input') if block.startswith('down') else (0, 'output')
            index = first + level * (layers + 1) + number
            path = f'{place}_blocks.{index}.{0 if kind == "resnet" else 1}'
        out[f'{path}.{inner}'] = value
    return out


def flux(state):
    """FLUX.1 of Black Forest Labs' code."""
    top = {
        'time_text_embed.timestep_embedder.linear_1': 'time_in.in_layer',
        'time_text_embed.timestep_embedder.linear_2': 'time_in.out_layer',
        'time_text_embed.text_embedder.linear_1': 'vector_in.in_layer',
        'time_text_embed.text_embedder.linear_2': 'vector_in.out_layer',
        'time_text_embed.guidance_embedder.linear_1': 'guidance_in.in_layer',
        'time_text_embed.guidance_embedder.linear_2': 'guidance_in.out_layer', 'context_embedder': 'txt_in',
        'x_embedder': 'img_in', 'proj_out': 'final_layer.linear',
    }  # fmt: skip
    double = {
        'norm1.linear': 'img_mod.lin', 'norm1_context.linear': 'txt_mod.lin', 'attn.to_out.0': 'img_attn.proj',
        'attn.to_add_out': 'txt_attn.proj', 'ff.net.0.proj': 'img_mlp.0', 'ff.net.2': 'img_mlp.2',
        'ff_context.net.0.proj': 'txt_mlp.0', 'ff_context.net.2': 'txt_mlp.2',
    }  # fmt: skip
    norms = {'attn.norm_q': 'query_norm', 'attn.norm_k': 'key_norm'}
    out = {}
    for name, value in state.items():
        if name.startswith('norm_out.'):
            out[name.replace('norm_out.linear', 'final_layer.adaLN_modulation.1')] = swap(value)
            continue
        if '_blocks.' not in name and not name.startswith('transformer_blocks.'):
            out[rename(name, top)] = value
            continue
        kind, number, inner = name.split('.', 2)
        stem, _, end = inner.rpartition('.')
        before = name.removesuffix(inner)
        if kind == 'single_transformer_blocks':
            path = f'single_blocks.{number}'
            if stem in norms:
                out[f'{path}.norm.{norms[stem]}.scale'] = value
            elif stem in ('norm.linear', 'proj_out'):
                out[f'{path}.{"modulation.lin" if stem == "norm.linear" else "linear2"}.{end}'] = value
            else:
                parts = [f'{before}{part}.{end}' for part in ('attn.to_q', 'attn.to_k', 'attn.to_v', 'proj_mlp')]
                out[f'{path}.linear1.{end}'] = fused(state, parts)
            continue
        path = f'double_blocks.{number}'
        added = re.fullmatch(r'attn\.norm_added_([qk])', stem)
        if stem in norms or added:
            side = 'txt' if added else 'img'
            out[f'{path}.{side}_attn.norm.{norms[stem.replace("added_", "")]}.scale'] = value
        elif re.fullmatch(r'attn\.to_[qkv]|attn\.add_[qkv]_proj', stem):
            side, pattern = ('txt', 'attn.add_{}_proj') if 'add' in stem else ('img', 'attn.to_{}')
            parts = [f'{before}{pattern.format(letter)}.{end}' for letter in 'qkv']
            out[f'{path}.{side}_attn.qkv.{end}'] = fused(state, parts)
        else:
            out[f'{path}.{rename(inner, double)}'] = value
    return out


def vae(state):
    """The autoencoder of CompVis' code."""
    levels = 1 + max(int(name.split('.')[2]) for name in state if name.startswith('encoder.down_blocks.'))
    attention = {'group_norm': 'norm', 'to_q': 'q', 'to_k': 'k', 'to_v': 'v', 'to_out.0': 'proj_out'}
    out = {}
    for name, value in state.items():
        up = re.match(r'decoder\.up_blocks\.(\d+)\.', name)
        if up:
            name = name.replace(up[0], f'decoder.up.{levels - 1 - int(up[1])}.')
        name = name.replace('.down_blocks.', '.down.').replace('.resnets.', '.block.')
        name = name.replace('samplers.0.', 'sample.').replace('.conv_shortcut.', '.nin_shortcut.')
        name = name.replace('mid_block.block.0.', 'mid.block_1.').replace('mid_block.block.1.', 'mid.block_2.')
        name = name.replace('.conv_norm_out.', '.norm_out.')
        part, found, inner = name.partition('mid_block.attentions.0.')
        if found:
            name = f'{part}mid.attn_1.{rename(inner, attention)}'
            value = value[:, :, None, None] if value.dim() == 2 else value
        out[name] = value
    return out

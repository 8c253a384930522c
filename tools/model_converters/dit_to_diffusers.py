"""Converts an original DiT or SiT checkpoint to a diffusers folder.

The originals name their tensors ``x_embedder``, ``t_embedder``, ``y_embedder``, ``blocks.N.attn.qkv`` and so on
(facebookresearch/DiT, willisma/SiT). Two details that a renaming alone would get wrong go into ``config.json``: the
layer norms' epsilon (1e-6), and ``timestep_freq_shift``, see ``mmaselect/diffusion/families/dit.py``.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.diffusion.families import DiT
from mmaselect.diffusion.families.dit import FREQUENCY_SHIFT
from mmaselect.errors import InputError
from mmaselect.files import write_json

#: Heads by width, of the published sizes S, B, L and XL: a checkpoint does not tell.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
#: Original name (below ``blocks.N.``) to diffusers' (below ``transformer_blocks.N.``).
BLOCK_NAMES = {
    'attn.proj': 'attn1.to_out.0',
    'mlp.fc1': 'ff.net.0.proj',
    'mlp.fc2': 'ff.net.2',
    'adaLN_modulation.1': 'norm1.linear',
}
TOP_NAMES = {
    'x_embedder.proj': 'pos_embed.proj',
    'final_layer.linear': 'proj_out_2',
    'final_layer.adaLN_modulation.1': 'proj_out_1',
}
#: diffusers embeds timestep and class in every block; the originals do it once.
SHARED_NAMES = {
    't_embedder.mlp.0': 'timestep_embedder.linear_1',
    't_embedder.mlp.2': 'timestep_embedder.linear_2',
    'y_embedder.embedding_table': 'class_embedder.embedding_table',
}


def read_checkpoint(path):
    """Reads the tensors; of a training checkpoint, the averaged ones."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f'checkpoint={str(path)!r} is not a file')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        # SiT's training script stores its argparse.Namespace: a plain holder of values, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise InputError(f'checkpoint={str(path)!r} is not readable: {str(error).splitlines()[0]}') from error
    return content.get('ema', content.get('model', content))


def infer_config(tensors, heads):
    """Arguments of ``DiTTransformer2DModel``, read off the shapes."""
    needed = ('x_embedder.proj.weight', 'pos_embed', 'y_embedder.embedding_table.weight', 'final_layer.linear.weight')
    for name in needed:
        if name not in tensors:
            raise InputError(f'checkpoint has no tensor {name!r}: an original DiT or SiT checkpoint is expected')
    width, in_channels, patch_size, _ = tensors['x_embedder.proj.weight'].shape
    heads = heads or HEADS.get(width)
    if heads is None or width % heads:
        raise InputError(f'heads={heads!r} does not fit a width of {width}: give --heads')
    return dict(
        num_layers=1 + max(int(match[1]) for name in tensors if (match := re.match(r'blocks\.(\d+)\.', name))),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        out_channels=len(tensors['final_layer.linear.weight']) // patch_size**2,
        sample_size=round(tensors['pos_embed'].shape[1] ** 0.5) * patch_size,
        patch_size=patch_size,
        num_embeds_ada_norm=len(tensors['y_embedder.embedding_table.weight']) - 1,
        norm_eps=1e-6,
    )


def convert(tensors, num_layers):
    """Renames; every original tensor but the position table must find its place."""
    out = {}
    for name, value in tensors.items():
        stem, _, end = name.rpartition('.')
        block = re.match(r'blocks\.(\d+)\.(.*)', stem)
        if stem in TOP_NAMES:
            out[f'{TOP_NAMES[stem]}.{end}'] = value
        elif stem in SHARED_NAMES:
            for index in range(num_layers):
                out[f'transformer_blocks.{index}.norm1.emb.{SHARED_NAMES[stem]}.{end}'] = value.clone()
        elif block and block[2] == 'attn.qkv':
            for letter, part in zip('qkv', value.chunk(3), strict=True):
                out[f'transformer_blocks.{block[1]}.attn1.to_{letter}.{end}'] = part.clone()
        elif block and block[2] in BLOCK_NAMES:
            out[f'transformer_blocks.{block[1]}.{BLOCK_NAMES[block[2]]}.{end}'] = value
        elif name != 'pos_embed':
            raise InputError(f'checkpoint has a tensor {name!r} that a DiT or SiT does not have')
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='original checkpoint, .pt or .safetensors')
    parser.add_argument('out', help='diffusers folder to write')
    parser.add_argument('--heads', type=int, help='attention heads, for sizes other than S, B, L and XL')
    args = parser.parse_args()
    tensors = read_checkpoint(args.checkpoint)
    config = infer_config(tensors, args.heads)
    model = DiT.build(config)
    table = model.pos_embed.pos_embed
    if table.shape != tensors['pos_embed'].shape or not torch.allclose(table, tensors['pos_embed'].float(), atol=1e-4):
        raise InputError('checkpoint has a position table that is not the sine-cosine one of DiT')
    try:
        model.load_state_dict(convert(tensors, config['num_layers']), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f'checkpoint={args.checkpoint!r} does not fit: {reason}') from error
    target = Path(args.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise InputError(f'out={args.out!r} exists already')
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary) / 'model'
        model.save_pretrained(folder / 'transformer')
        file = folder / 'transformer' / 'config.json'
        write_json(file, {**json.loads(file.read_text()), FREQUENCY_SHIFT: 0})
        # DiT's betas; a SiT is a rectified flow and reads none of it.
        scheduler = dict(
            _class_name='DDIMScheduler',
            num_train_timesteps=1000,
            beta_start=0.0001,
            beta_end=0.02,
            beta_schedule='linear',
            prediction_type='epsilon',
        )
        write_json(folder / 'scheduler' / 'scheduler_config.json', scheduler)
        folder.rename(target)
    print(f'{args.out}: {config["num_layers"]} blocks, {config["num_attention_heads"]} heads')


if __name__ == '__main__':
    cli.run(main)

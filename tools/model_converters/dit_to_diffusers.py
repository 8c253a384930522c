"""Converts an original DiT or SiT checkpoint to a diffusers folder.

The originals name their tensors ``x_embedder``, ``t_embedder``, ``y_embedder``, ``blocks.N.attn.qkv`` and so on
(facebookresearch/DiT, willisma/SiT). Details that a renaming alone would get wrong go into ``config.json``: the layer
norms' epsilon (1e-6), ``timestep_freq_shift``, see ``mmaselect/diffusion/families/dit.py``, and of a SiT the direction
of its time and its path, see ``sit.py`` there.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.errors import InputError, one_line
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
TABLE = 'y_embedder.embedding_table.weight'
NEEDED = ('x_embedder.proj.weight', 'pos_embed', TABLE, 'final_layer.linear.weight')
#: Heads that projects add for their training, which features do not need. In the code of these, time 0 is data.
PROJECTS = {'projectors.': 'REPA', 'ap_head.': 'SRA'}
#: Tensors of networks that differ from DiT in what they compute.
FOREIGN = {
    r'feat_rope|\.rope\.|freqs_cos': 'a rotary position embedding, as LightningDiT has',
    r'\.mlp\.w(12|1|2|3)\.': 'a SwiGLU, as LightningDiT has',
    r'\.attn\.[qk]_norm\.': 'a norm of query or key, as LightningDiT has',
    r'^bn\.': 'a normalisation of the latents, as REPA-E has',
}


def read_checkpoint(path):
    """Reads the tensors, of a training checkpoint the averaged ones, and the arguments of the training."""
    from mmaselect.diffusion.loading import read_pickle, unwrap

    path = Path(path)
    if not path.is_file():
        raise InputError(f'checkpoint={str(path)!r} is not a file')
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file

        try:
            return unwrap(load_file(path), path), {}
        except Exception as error:
            raise InputError(f'checkpoint={str(path)!r} is not readable: {one_line(error)}') from error
    content = read_pickle(path)
    args = content.get('args') if isinstance(content, dict) else None
    return unwrap(content, path), args if isinstance(args, dict) else vars(args or argparse.Namespace())


def refuse_others(tensors):
    """Names what is no DiT although its tensors are called alike."""
    for pattern, found in FOREIGN.items():
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name:
            raise InputError(f'checkpoint has {name!r}, {found}: there is no family for it yet')
    name = next((name for name, value in tensors.items() if value.dim() > 1 and not value.is_floating_point()), None)
    if name:
        raise InputError(f'checkpoint is quantised ({name!r} is {tensors[name].dtype}): give the unquantised one')


def with_null_class(table, classes, null):
    """The table of classes with the null row that the features are read under, last."""
    if classes is not None and len(table) - classes not in (0, 1):
        raise InputError(f'num_classes={classes} does not fit a table of {len(table)} classes')
    # ImageNet's 1000, unless the checkpoint says otherwise.
    if len(table) != (classes or 1000):
        return table
    if null is None:
        raise InputError(
            f'checkpoint has {len(table)} rows for {len(table)} classes and was trained without a null class: give '
            '--null-class zero or --null-class mean to use that embedding in its place, or --num-classes if the last '
            'row is the null class'
        )
    import torch

    row = torch.zeros_like(table[:1]) if null == 'zero' else table.mean(0, keepdim=True)
    return torch.cat([table, row])


def infer_config(tensors, heads):
    """Arguments of ``DiTTransformer2DModel``, read off the shapes."""
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
        num_embeds_ada_norm=len(tensors[TABLE]) - 1,
        norm_eps=1e-6,
    )


def describe_process(tensors, stored, args):
    """What SiT's config says of time and path: of the flags, the training's own arguments and known projects."""
    from mmaselect.diffusion.families.sit import DATA_TIME, PATH_NAMES, PATH_TYPE

    project = next((name for head, name in PROJECTS.items() if any(key.startswith(head) for key in tensors)), None)
    time = args.data_time
    if time is None and project:
        time = 0
    path = args.path_type or stored.get('path_type')
    if path is not None and path not in PATH_NAMES:
        raise InputError(f'path_type={path!r} of the checkpoint is not known; choose from: {", ".join(PATH_NAMES)}')
    found = {DATA_TIME: time, PATH_TYPE: PATH_NAMES.get(path)}
    return project, {name: value for name, value in found.items() if value is not None}


def check_positions(table, there):
    """Refuses a position table that is not DiT's, at the precision of the file."""
    import torch

    tolerance = max(1e-4, torch.finfo(there.dtype).eps)
    if table.shape != there.shape or not torch.allclose(table, there.float(), atol=tolerance, rtol=0):
        raise InputError('checkpoint has a position table that is not the sine-cosine one of DiT')


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
            for letter, part in zip('qkv', value.chunk(3)):
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
    parser.add_argument('--num-classes', type=int, help="classes of the training, where they are not ImageNet's 1000")
    parser.add_argument('--null-class', choices=['zero', 'mean'], help='embedding that takes the place of a null class')
    parser.add_argument(
        '--data-time', type=int, choices=[0, 1],
        help='what a SiT is told at clean data: 1 in its own code (default), 0 in that of REPA and SRA (found by their '
        'extra heads)',
    )  # fmt: skip
    parser.add_argument(
        '--path-type',
        choices=['Linear', 'linear', 'GVP', 'cosine', 'VP'],
        help='path of a SiT; default: what the training stored',
    )
    args = parser.parse_args()
    from mmaselect.diffusion.families import DiT
    from mmaselect.diffusion.families.dit import FREQUENCY_SHIFT

    tensors, stored = read_checkpoint(args.checkpoint)
    refuse_others(tensors)
    for name in NEEDED:
        if name not in tensors:
            raise InputError(f'checkpoint has no tensor {name!r}: an original DiT or SiT checkpoint is expected')
    project, process = describe_process(tensors, stored, args)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(PROJECTS))}
    tensors[TABLE] = with_null_class(tensors[TABLE], args.num_classes or stored.get('num_classes'), args.null_class)
    config = infer_config(tensors, args.heads)
    model = DiT.build(config)
    check_positions(model.pos_embed.pos_embed, tensors['pos_embed'])
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
        write_json(file, {**json.loads(file.read_text()), FREQUENCY_SHIFT: 0, **process})
        # DiT's betas; a SiT is an interpolant and reads none of it.
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
    found = [f'{config["num_layers"]} blocks, {config["num_attention_heads"]} heads', *([project] if project else [])]
    print(f'{args.out}: {", ".join(found + [f"{name}={value}" for name, value in process.items()])}')


if __name__ == '__main__':
    cli.run(main)

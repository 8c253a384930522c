"""Writes the features of images into a safetensors file, with the names of the images."""

import argparse

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.errors import InputError

DESCRIPTION = """\
Writes the features of images into a safetensors file.

Each tensor is named timestep, block and component, as in t450.block12.query. The file's metadata has the names of the
images, in the order of the rows, as JSON under 'images'.
"""


def parse_args():
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a config, whose backbone is read; or a diffusers folder or hub id')
    parser.add_argument('images', nargs='+', help='files and folders; each is scaled and cropped to the model')
    parser.add_argument('-o', '--out', required=True, help='a .safetensors file')
    parser.add_argument('--selection', help='selection.json, which names timestep, block and component')
    parser.add_argument('--timestep', type=float, nargs='+', help='0-1000; default: that of the config')
    parser.add_argument('--block', type=int, nargs='+', help='default: that of the config, or the middle one')
    parser.add_argument('--component', nargs='+', help='default: that of the config, or query')
    parser.add_argument('--type', help='family of the model, where its config.json does not tell')
    parser.add_argument('--device', help='default: an accelerator if there is one')
    parser.add_argument('--dtype', help='float32, bfloat16 or float16')
    parser.add_argument('--pool', action='store_true', help='average each map over its cells')
    parser.add_argument('--noise', help='fixed or fresh; default: that of the config, or fixed')
    parser.add_argument('--seed', type=int, help='of the noise; default: that of the config, or 0')
    parser.add_argument('--size', type=int, help='side of the images in pixels; default: what the model was trained on')
    cli.add_cfg_options(parser)
    return parser.parse_args()


def read_backbone(args):
    """Fields of the backbone: those of the command line, then those of the config."""
    if args.model.endswith('.py'):
        backbone = dict(cli.read_config(args.model, args.cfg_options).model.backbone)
    elif args.cfg_options:
        raise InputError(f'--cfg-options are settings of a config; model={args.model!r} is none')
    else:
        backbone = dict(diffusion=dict(type=args.type or 'auto', pretrained=args.model))
    for name, field in (('timestep', 'timestep'), ('block', 'block'), ('component', 'component'), ('noise', 'noise'),
                        ('seed', 'noise_seed')):  # fmt: skip
        if getattr(args, name) is not None:
            backbone[field] = getattr(args, name)
    if args.dtype is not None:
        backbone['diffusion'] = dict(backbone['diffusion'], dtype=args.dtype)
    return backbone


def choose(args, backbone):
    """Timestep and taps: those of a selection, or of the backbone."""
    from mmaselect.selection.report import Selection, read_selection

    if args.selection is not None:
        content = read_selection(args.selection)
        if content is None:
            raise InputError(f'--selection {args.selection!r} is not a file')
        return Selection.from_dict(content), {}
    timestep = backbone.get('timestep', 'auto')
    block, component = backbone.get('block'), backbone.get('component', 'query')
    for name, value in (('timestep', timestep), ('block', block), ('component', component)):
        if value == 'auto':
            raise InputError(f'{name} is open: give --{name}, or --selection with what `mmaselect select` has written')
    if args.block is None and args.component is None and backbone.get('taps') is not None:
        return timestep, dict(taps=backbone['taps'])
    return timestep, dict(block=block, component=component)


def main():
    args = parse_args()
    if not args.out.endswith('.safetensors'):
        raise InputError(f'--out {args.out!r} is not valid: give a name that ends in .safetensors')
    from mmengine.device import get_device

    from mmaselect.apis.features import write_features

    backbone = read_backbone(args)
    timestep, taps = choose(args, backbone)
    shapes = write_features(
        args.out,
        dict(backbone['diffusion'], device=args.device or get_device()),
        args.images,
        timestep,
        **taps,
        pool=args.pool,
        noise=backbone.get('noise', 'fixed'),
        seed=backbone.get('noise_seed', 0),
        size=args.size,
        progress=True,
    )
    for name, shape in shapes.items():
        print(f'{args.out}: {name} {tuple(shape)}')


if __name__ == '__main__':
    cli.run(main)

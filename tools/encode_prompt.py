"""Embeds the constant prompt of a Stable Diffusion 3 model once, so that its text encoders are never loaded again."""

import argparse
from pathlib import Path

import torch

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
from mmaselect.diffusion.loading import Source, parse_dtype
from mmaselect.errors import InputError


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', help='diffusers folder or hub id')
    parser.add_argument('out', nargs='?', help='file to write; default: where the backbone looks for it')
    parser.add_argument('--prompt', default='', help='the prompt; empty by default')
    parser.add_argument('--dtype', default='bfloat16', help='dtype of the text encoders')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    source = Source(args.model, 'model')
    out = Path(args.out) if args.out else default_prompt_file(source, args.prompt)
    if out.suffix != '.safetensors':
        raise InputError(f'out={str(out)!r} is not valid: give a name that ends in .safetensors')
    index = source.read_json('model_index.json')
    if index is None or index.get('_class_name') != 'StableDiffusion3Pipeline':
        found = None if index is None else index.get('_class_name')
        raise InputError(f'model={args.model!r} holds {found!r}; a StableDiffusion3Pipeline is expected')
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        source.folder or args.model, transformer=None, vae=None, torch_dtype=parse_dtype(args.dtype)
    ).to(args.device)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=args.prompt, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, device=args.device
    )
    save_prompt(out, {'prompt_embeds': embeds, 'pooled_prompt_embeds': pooled}, args.prompt, args.model)
    print(f'{out}: {tuple(embeds.shape)} and {tuple(pooled.shape)} for prompt {args.prompt!r}')


if __name__ == '__main__':
    cli.run(main)

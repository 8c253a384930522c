"""Embeds the constant prompt of a text-conditional model once, so that its text encoders are never loaded again."""

import argparse
import inspect
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli
from mmaselect.errors import InputError, check_choice
from mmaselect.progress import working


def named(embeds, pooled=None):
    from mmaselect.diffusion.conditioning import KEYS

    return dict(zip(KEYS, (embeds,) if pooled is None else (embeds, pooled)))


def encode_stable_diffusion(pipeline, text, device):
    return named(pipeline.encode_prompt(text, device, 1, False)[0])


def encode_xl(pipeline, text, device):
    embeds, _, pooled, _ = pipeline.encode_prompt(text, device=device, do_classifier_free_guidance=False)
    return named(embeds, pooled)


def encode_sd3(pipeline, text, device):
    embeds, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False, device=device)
    return named(embeds, pooled)


def encode_flux(pipeline, text, device):
    return named(*pipeline.encode_prompt(text, None, device=device)[:2])


def encode_pixart(pipeline, text, device):
    embeds, mask, *_ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, device=device)
    # To leave out the tokens that the mask hides is the same, since a prompt's tokens have no order in the blocks.
    return named(embeds[:, mask[0].bool()])


def encode_gemma(pipeline, text, device):
    # A text gets the instruction that the pipeline puts before it. The empty one gets none: it is what the pipeline
    # takes for no prompt. What the mask hides is left out, as for PixArt.
    called = inspect.signature(pipeline.__call__).parameters
    more = {name: called[name].default for name in ('complex_human_instruction',) if name in called}
    found = pipeline.encode_prompt(text, device=device, negative_prompt='', **more)
    embeds, mask = found[:2] if text else found[2:]
    return named(embeds[:, mask[0].bool()])


def encode_hunyuan(pipeline, text, device):
    import torch

    # The mask stays: padding is replaced by something that the model learned.
    bert, t5 = (
        pipeline.encode_prompt(text, device=device, do_classifier_free_guidance=False, text_encoder_index=index)
        for index in (0, 1)
    )
    return {'prompt_embeds': bert[0], 'prompt_embeds_2': t5[0], 'prompt_mask': torch.cat([bert[2], t5[2]], 1)}


def encode_tokens(pipeline, text, device):
    return named(pipeline.encode_prompt(text, device=device)[0])


def encode_z_image(pipeline, text, device):
    return named(pipeline.encode_prompt(text, device=device, do_classifier_free_guidance=False)[0][0][None])


ENCODERS = {
    'StableDiffusionPipeline': encode_stable_diffusion,
    'StableDiffusionXLPipeline': encode_xl,
    'StableDiffusion3Pipeline': encode_sd3,
    'FluxPipeline': encode_flux,
    'PixArtAlphaPipeline': encode_pixart,
    'PixArtSigmaPipeline': encode_pixart,
    'SanaPipeline': encode_gemma,
    'Lumina2Pipeline': encode_gemma,
    'HunyuanDiTPipeline': encode_hunyuan,
    'Flux2Pipeline': encode_tokens,
    'Flux2KleinPipeline': encode_tokens,
    'QwenImagePipeline': encode_tokens,
    'ZImagePipeline': encode_z_image,
}
#: Before diffusers 0.36 these read the configs of networks that a prompt does not need: they are loaded, too.
WHOLE = ('StableDiffusionPipeline', 'StableDiffusionXLPipeline', 'PixArtAlphaPipeline', 'PixArtSigmaPipeline')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', help='diffusers folder or hub id, or ID@REVISION')
    parser.add_argument('out', nargs='?', help='file to write; default: where the backbone looks for it')
    parser.add_argument('--prompt', default='', help='the prompt; empty by default')
    parser.add_argument('--revision', help='branch, tag or commit on the hub')
    parser.add_argument('--dtype', default='bfloat16', help='dtype of the text encoders')
    parser.add_argument('--device', help="default: 'cuda' where there is one, or else 'cpu'")
    args = parser.parse_args()
    import torch

    from mmaselect.diffusion.conditioning import default_prompt_file, save_prompt
    from mmaselect.diffusion.loading import Source, parse_dtype

    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    source = Source(args.model, 'model', args.revision)
    out = Path(args.out) if args.out else default_prompt_file(source, args.prompt)
    if out.suffix != '.safetensors':
        raise InputError(f'out={str(out)!r} is not valid: give a name that ends in .safetensors')
    index = source.read_json('model_index.json') or {}
    found = index.get('_class_name')
    check_choice(found, f'the pipeline of model={args.model!r},', ENCODERS)
    import diffusers
    from packaging.version import Version

    whole = found in WHOLE and Version(diffusers.__version__) < Version('0.36')
    left_out = () if whole else tuple(name for name in ('vae', 'unet', 'transformer') if name in index)
    with working('loading the text encoders'):
        pipeline = getattr(diffusers, found).from_pretrained(
            source.folder or source.repository, revision=source.revision, torch_dtype=parse_dtype(args.dtype),
            **dict.fromkeys(left_out),
        ).to(device)  # fmt: skip
    with working('encoding the prompt'), torch.no_grad():
        embeds = ENCODERS[found](pipeline, args.prompt, device)
    save_prompt(out, embeds, args.prompt, args.model)
    shapes = ' and '.join(str(tuple(value.shape)) for value in embeds.values())
    print(f'{out}: {shapes} for prompt {args.prompt!r}')


if __name__ == '__main__':
    cli.run(main)

"""A row for each family of models, in miniature."""

import copy
import time

import torch

from benchmarks.common import SHAPE, UNET, Row, count_multiply_adds, interleave
from mmaselect import cli
from mmaselect.diffusion.conditioning import zero_prompt
from mmaselect.diffusion.model import DiffusionSpec

#: A miniature of each family: large enough that a pass takes more than 50 ms, small enough for two cores.
WIDE = dict(num_attention_heads=6, attention_head_dim=64)

ROPE = dict(WIDE, joint_attention_dim=256, axes_dims_rope=(16, 24, 24), in_channels=64)

MINIATURES = {
    'SD3': (dict(SHAPE, num_layers=12), None),
    'DiT': (dict(WIDE, num_layers=12, in_channels=4, out_channels=8, sample_size=32), None),
    'SiT': (dict(WIDE, num_layers=12, in_channels=4, out_channels=8, sample_size=32), None),
    'UNet': (UNET, 'gdf-sd15'),
    'ADM': (
        dict(
            sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128, 128),
            attention_head_dim=32, norm_num_groups=16,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
            up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        ),
        ['mid-repeat1-res-out'],
    ),
    'PixArt': (
        dict(WIDE, num_layers=12, cross_attention_dim=384, caption_channels=256, sample_size=32, norm_num_groups=4,
             use_additional_conditions=False),
        None,
    ),
    'Sana': (
        dict(num_layers=12, num_attention_heads=12, attention_head_dim=32, num_cross_attention_heads=6,
             cross_attention_head_dim=64, cross_attention_dim=384, caption_channels=256, sample_size=32),
        None,
    ),
    'HunyuanDiT': (
        dict(WIDE, num_layers=12, hidden_size=384, in_channels=4, patch_size=2, sample_size=32,
             cross_attention_dim=256, cross_attention_dim_t5=256, pooled_projection_dim=64),
        None,
    ),
    'Flux': (dict(ROPE, num_layers=4, num_single_layers=8, pooled_projection_dim=64, guidance_embeds=True), None),
    'Flux2': (dict(ROPE, num_layers=3, num_single_layers=9, axes_dims_rope=(16, 16, 16, 16)), None),
    'QwenImage': (dict(ROPE, num_layers=8, out_channels=16), None),
    'ZImage': (
        dict(n_layers=10, n_refiner_layers=2, dim=384, n_heads=6, n_kv_heads=6, cap_feat_dim=256, in_channels=16,
             axes_dims=[16, 24, 24], axes_lens=[1024, 512, 512]),
        None,
    ),
    'Lumina2': (
        dict(num_layers=10, num_refiner_layers=2, hidden_size=384, num_attention_heads=6, num_kv_heads=2,
             axes_dim_rope=(16, 24, 24), axes_lens=(300, 512, 512), cap_feat_dim=256, in_channels=16, sample_size=64),
        None,
    ),
}  # fmt: skip


def bench_families(args, folder):
    """Every family in miniature: its middle block's query, or a set of a U-Net's, against hooks on the full pass."""
    for name, miniature in MINIATURES.items():
        yield bench_family(args, name, *miniature)


def bench_family(args, name, arch, named):
    from mmaselect.diffusion.loading import initialise
    from mmaselect.diffusion.network import to_map

    spec, read = DiffusionSpec(type=name, arch=arch), {}
    (taps,) = spec.alternatives(None, 'query', named)
    full = spec.family.build(spec.config).eval()
    initialise(full, spec.seed)
    # The network alone, with the same weights: the VAE is not timed, and some of these latents have no known one.
    prompt = zero_prompt(spec.family.prompt_widths(full.config), spec.family.prompt_tokens)
    process = spec.family.make_process({}, spec.shift, spec.config)
    model = spec.family(copy.deepcopy(full), taps, process, prompt=prompt or None).to(args.device)
    full.to(args.device)
    for tap, site in spec.family.find(full, taps, False).items():
        layer = full.get_submodule(site.module)
        layer.register_forward_hook(
            lambda module, inputs, output, tap=tap, site=site: read.update({tap: site.pick(output)})
        )
    size = (args.size // 8, args.size // 8)
    latent = torch.randn(args.batch_size, spec.family.latent_channels(spec.config), *size, device=args.device)
    prompt = {one: getattr(model, one) for one in spec.family.prompt_widths(full.config)}
    steps = torch.full((len(latent),), float(model.time(300.0)), device=args.device)

    @torch.no_grad()
    def ours():
        return model(latent, 300.0)

    @torch.no_grad()
    def theirs():
        full(**spec.family.arguments(full.config, latent, steps, prompt), return_dict=False)
        return {tap: to_map(value, size, model.shapes[tap][1], model.image_first) for tap, value in read.items()}

    expected = theirs()
    difference = max(((one - expected[tap]).norm() / expected[tap].norm()).item() for tap, one in ours().items())
    if difference > 1e-4:
        raise cli.InputError(f'the features of {name} differ by {difference:.2g}: nothing was timed')
    possible = count_multiply_adds(theirs) / count_multiply_adds(ours)
    # On a CPU by its time: other processes of the machine do not count.
    clock = time.process_time if args.device == 'cpu' else time.perf_counter
    mine, other = interleave(args.repeats, ours, theirs, clock=clock)
    return Row(
        f'features of {name}, {", ".join(tap.component for tap in taps)} at block {model.last_block}',
        "diffusers' full forward with a hook", f'{1e3 * mine:.0f} ms', f'{1e3 * other:.0f} ms', other / mine,
        (0.95 if other < 0.05 else 0.97) * possible,
        f'{possible:.2f}x fewer multiply-adds; relative difference {difference:.1g}',
    )  # fmt: skip

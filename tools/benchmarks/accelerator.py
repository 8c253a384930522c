"""SD3.5-medium's true shape on an accelerator."""

from pathlib import Path

import torch

from benchmarks.common import BLOCK, SHAPE, Row, count_multiply_adds, interleave, read_status
from mmaselect import cli
from mmaselect.diffusion.model import DiffusionSpec
from mmaselect.diffusion.taps import Tap


def matrix_rate(device, dtype):
    """Multiply-adds per second of large matrix products: what the device can do at best."""
    side = 8192 if device.type == 'cuda' else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = interleave(5, lambda: one @ other)
    return side**3 / seconds


def peak_memory(device, work):
    """Bytes that a piece of work takes at its peak, weights and all on an accelerator."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    Path('/proc/self/clear_refs').write_text('5')
    work()
    return read_status('VmHWM')


#: Kernels, and compiled or not, of the row ``accelerator``.
HOW = (('auto', False), ('flash', False), ('auto', True), ('flash', True))


def bench_accelerator(args, folder):
    """SD3.5-medium's true shape in bfloat16, compiled and not, by torch's choice of kernel and by flash.

    Against a loop that encodes, noises and runs the whole network with a hook. On a CPU a quarter of the width stands
    in: the same lines run, and the numbers say nothing.
    """
    device, tap = torch.device(args.device), Tap(BLOCK, 'query')
    arch, size = ('sd3.5-medium', 512) if device.type == 'cuda' else (SHAPE, args.size)
    spec = DiffusionSpec(type='SD3', arch=arch, prompt='zeros', dtype='bfloat16', device=args.device)
    model = spec.load((tap,))
    with torch.device('meta'):
        full = spec.family.build(spec.config)
    for parameter in full.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    full = full.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    used = {**dict(model.family.transformer.named_parameters()), **dict(model.family.transformer.named_buffers())}
    for name, value in [*full.named_parameters(), *full.named_buffers()]:
        # Behind the last tap any numbers do.
        value.data.copy_(used[name]) if name in used else value.data.normal_(0, 0.02, generator=generator)
    read = {}
    layer = full.transformer_blocks[BLOCK].attn.to_q
    layer.register_forward_hook(lambda module, inputs, output: read.update(query=output))
    prompt = {name: getattr(model.family, name) for name in spec.family.prompt_widths(full.config)}
    images = torch.rand(args.batch_size, 3, size, size, device=device) * 2 - 1
    noise = torch.randn(16, size // 8, size // 8, device=device)

    def ours():
        return model(model.encode(images), noise, 300.0)[tap]

    @torch.no_grad()
    def theirs():
        noisy = model.family.process.add_noise(model.encode(images).float(), noise, 300.0).bfloat16()
        time = torch.full((len(noisy),), 300.0, device=device)
        full(**spec.family.arguments(full.config, noisy, time, prompt), return_dict=False)
        return read.pop('query').transpose(1, 2).unflatten(2, (size // 16, size // 16))

    expected = theirs().float()
    adds, all_adds = count_multiply_adds(ours), count_multiply_adds(theirs)
    rate, naive = matrix_rate(device, torch.bfloat16), peak_memory(device, theirs)
    rows = []
    for attention, compiled in HOW:
        name = f'attention={attention!r}, {"compiled" if compiled else "eager"}'
        model.family.accelerate(attention, compiled)
        try:
            found = ours().float()
        except cli.InputError as error:
            print(f'{name}: {error}')
            continue
        difference = ((found - expected).norm() / expected.norm()).item()
        if difference > 2e-2:
            raise cli.InputError(f'with {name} the features differ by {difference:.2g}: nothing was timed')
        mine, other = interleave(args.repeats, ours, theirs)
        peak = peak_memory(device, ours)
        rows.append(
            Row(
                f'{arch if isinstance(arch, str) else "SD3 in miniature"}, {size} pixels, bfloat16, {name}',
                "encode, noise, diffusers' full forward with a hook", f'{args.batch_size / mine:.2f} images/s',
                f'{args.batch_size / other:.2f} images/s', other / mine, 0.95 * all_adds / adds,
                f'{100 * adds / mine / rate:.0f} % of the {rate / 1e12:.2f} T multiply-adds/s of matrix products; peak '
                f'{peak / 1e9:.1f} GB, the loop {naive / 1e9:.1f} GB; relative difference {difference:.1g}',
            )
        )  # fmt: skip
    return rows

"""Times training iterations of a config on random images, and prints the memory they take.

The frozen model is the config's own, or with ``--arch`` the real architecture with random weights.
"""

import argparse
import resource
import statistics
import time

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a segmentor')
    parser.add_argument('--arch', help='architecture with random weights in place of the pretrained ones')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--size', type=int, default=512, help='side of the images, in pixels')
    parser.add_argument('--iterations', type=int, default=3, help='timed iterations, after one that is not')
    cli.add_cfg_options(parser)
    return parser.parse_args()


def random_batch(args, num_classes):
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    inputs = [torch.randint(0, 256, (3, args.size, args.size), dtype=torch.uint8) for _ in range(args.batch_size)]
    samples = []
    for _ in inputs:
        sample = SegDataSample(metainfo=dict(img_shape=(args.size, args.size), ori_shape=(args.size, args.size)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, num_classes, (1, args.size, args.size)))
        samples.append(sample)
    return {'inputs': inputs, 'data_samples': samples}


def memory():
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    args = parse_args()
    import torch
    from mmengine.model.utils import revert_sync_batchnorm
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope

    torch.manual_seed(0)
    cfg = cli.read_config(args.config, args.cfg_options)
    cfg.model.backbone.timestep = 250
    if args.arch:
        for key in ('pretrained', 'vae'):
            cfg.model.backbone.diffusion.pop(key, None)
        cfg.model.backbone.diffusion.arch = args.arch
    init_default_scope(cfg.default_scope)
    started = time.perf_counter()
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    if torch.cuda.is_available():
        model.cuda()
    model.train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = random_batch(args, cfg.model.decode_head.num_classes)
    print(f'built in {time.perf_counter() - started:.1f} s, peak memory {memory():.2f} GiB', flush=True)
    whole, frozen = [], []

    def timed(seconds, function):
        def run(*inputs, **fields):
            begun = time.perf_counter()
            out = function(*inputs, **fields)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            return out

        return run

    model.backbone.forward = timed(frozen, model.backbone.forward)
    step = timed(whole, model.train_step)
    for _ in range(args.iterations + 1):
        step(batch, optimizer)
    print(
        f'{args.batch_size} x {args.size}x{args.size}: {statistics.median(whole[1:]):.2f} s per iteration, of which '
        f'{statistics.median(frozen[1:]):.2f} s in the frozen backbone (medians of {args.iterations}); '
        f'peak memory {memory():.2f} GiB'
    )


if __name__ == '__main__':
    cli.run(main)

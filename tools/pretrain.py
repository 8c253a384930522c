"""Trains a small diffusion transformer and writes it as a diffusers folder."""

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = cli.base_parser('Train a small diffusion transformer by flow matching or noise prediction')
    parser.add_argument('--out', help='folder to export to; default: export_dir of the config')
    cli.add_resume(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = cli.load_config(args)
    cli.merge_resume(cfg, args.resume)
    cfg = cli.finish_config(cfg, args)
    runner = cli.build_runner(cfg, 'train_dataloader')
    runner.train()
    if runner.rank == 0:
        from mmengine.runner.checkpoint import load_checkpoint

        from mmaselect.hooks.images import unwrap

        # The checkpoint holds the averaged weights (EMAHook), the model in memory those of the last step.
        model = unwrap(runner)
        load_checkpoint(model, cli.latest_checkpoint(cfg.work_dir), map_location='cpu', strict=True)
        # A data set of latents brings the encoder that made them.
        encoder = getattr(runner.train_dataloader.dataset, 'encoder', None)
        file = model.export(args.out or cfg.export_dir, encoder)
        print(f'{file} ({file.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    cli.run(main)

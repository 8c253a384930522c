"""Selects timestep, block and component, as far as a config leaves them open, without training."""

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli


def parse_args():
    parser = cli.base_parser('Select the timestep of a backbone; writes selection.json, selection.png and report.html')
    cli.add_selection(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    runner, hook = cli.build_selection(cfg, args)
    content = hook.select(runner)
    if runner.rank == 0:
        timesteps = content['timestep'] if isinstance(content['timestep'], list) else [content['timestep']]
        print(
            f'timestep {", ".join(f"{one:g}" for one in timesteps)}, block {content["block"]}, {content["component"]} '
            f'-> {runner.work_dir}/selection.json, selection.png, report.html'
        )


if __name__ == '__main__':
    cli.run(main)

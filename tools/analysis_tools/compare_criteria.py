"""What each criterion is worth: what its choices lose against a linear probe at every timestep and tap.

A criterion is judged under the noise that the head will see, so there is one table per policy of the backbone:
`fixed` (one noise for all images) and `fresh` (each image has its own). Where the optimum lies is printed first.
"""

import time
from pathlib import Path

import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
from mmaselect import cli

SIGMAS = (0.05, 0.1, 0.25, 0.4)
RULES = (0, 100, 500)


def parse_args():
    parser = cli.base_parser(__doc__)
    parser.add_argument('--blocks', type=int, nargs='+', help='blocks to compare; default: that of the config')
    parser.add_argument('--components', nargs='+', help='likewise')
    parser.add_argument('--noise', nargs='+', choices=('fixed', 'fresh'), default=['fixed', 'fresh'])
    parser.add_argument('--latents', help='a safetensors file that keeps latents, for further runs and other models')
    cli.add_selection(parser)
    return parser.parse_args()


def list_criteria(hook):
    """All of them; those that read views read those of the config's criterion."""
    views = {name: value for name, value in hook.config.items() if name in ('num_views', 'views')}
    pool = hook.config.get('pool', 1)
    entries = [dict(type='InstanceInformation', pool=one, **views) for one in dict.fromkeys((pool, 1, 2, 4))]
    entries += [dict(type=name, **views) for name in ('ViewConsistency', 'RankMe', 'LiDAR')]
    entries += [dict(type='NoiseConsistentHFR', centred=centred) for centred in (True, False)]
    entries += [dict(type='HighFrequencyRatio', sigma=sigma, norm=norm) for norm in (2, 1) for sigma in SIGMAS]
    return [*entries, dict(type='FisherScore')]


def main():
    args = parse_args()
    cfg = cli.finish_config(cli.load_config(args), args)
    pairs = [(block, one) for one in args.components or () for block in args.blocks or ()]
    if pairs:
        cfg.model.backbone.block, cfg.model.backbone.component = map(list, zip(*pairs))
    elif args.blocks:
        cfg.model.backbone.block = args.blocks
    from mmaselect.evaluation.figures import write_csv
    from mmaselect.evaluation.latents import remember_latents
    from mmaselect.evaluation.probe import probe
    from mmaselect.evaluation.verdict import judge, judge_rule
    from mmaselect.hooks.images import find_backbone
    from mmaselect.selection.search import count_passes

    runner, hook = cli.build_selection(cfg, args)
    criteria = list_criteria(hook)
    hook = type(hook)(
        **{name: getattr(hook, name) for name in ('timesteps', 'num_images', 'batch_size', 'pipeline', 'seed')},
        criterion=criteria[0], compare=criteria[1:],
    )  # fmt: skip
    backbone = find_backbone(runner)
    taps, timesteps, store = backbone.diffusion.family.taps, hook.timesteps, Path(runner.work_dir) / 'probes.json'
    taps = list(dict.fromkeys(taps))
    memory = remember_latents(backbone.diffusion, args.latents)
    rows = []
    for policy in args.noise:
        found = probe(runner, timesteps, taps, policy, hook.seed, store)
        memory.save()
        print_optimum(policy, found.accuracy, timesteps)
        backbone.noise = policy
        started = time.perf_counter()
        selection, _ = hook.score(runner, [(tap,) for tap in taps])
        seconds = time.perf_counter() - started
        memory.save()
        sweep = selection.sweep
        per_pass = sweep.num_images * len(timesteps) * backbone.diffusion.num_blocks
        for label, criterion in hook.criteria.items():
            draws, views = count_passes([criterion])
            evaluations = per_pass * (draws + views - 1)
            rows.append({
                'noise': policy, 'criterion': label, **vars(judge(sweep.scores[label], found.accuracy, timesteps)),
                'block evaluations': evaluations, 'seconds': round(seconds * evaluations / sweep.block_evaluations, 1),
            })  # fmt: skip
        for rule in RULES:
            verdict = vars(judge_rule(rule, found.accuracy, timesteps))
            rows.append(
                {'noise': policy, 'criterion': f'always {rule}', **verdict, 'block evaluations': 0, 'seconds': 0.0}
            )
        print(table([row for row in rows if row['noise'] == policy]), flush=True)
        print(
            f'\n{len(taps)} taps, {len(timesteps)} timesteps, {sweep.num_images} images; one search of {seconds:.0f} s '
            f'for all criteria, of which each is given the share of its passes; '
            f'probes: {found.block_evaluations} block evaluations, {found.feature_seconds + found.probe_seconds:.0f} s'
        )
    path = Path(runner.work_dir) / 'criteria.csv'
    write_csv(path, [{**row, 'picks': ' '.join(f'{pick:g}' for pick in row['picks'])} for row in rows])
    print(path)


def print_optimum(policy, accuracy, timesteps):
    """Accuracy of the probes, before any criterion is computed."""
    lines = [f'\n{policy} noise, accuracy of a linear probe (%)\n']
    lines += [f'| tap | {" | ".join(f"{one:g}" for one in timesteps)} |', f'|---|{"---:|" * len(timesteps)}']
    for (block, component), values in accuracy.items():
        cells = [f'**{value:.1f}**' if value == max(values) else f'{value:.1f}' for value in values]
        lines.append(f'| block {block}, {component} | {" | ".join(cells)} |')
    print('\n'.join(lines), flush=True)


def table(rows):
    """A Markdown table: it goes into the documentation as it is."""
    names = ('criterion', 'r', 'gap: mean', 'largest', 'joint gap', 'block evaluations', 'seconds')
    lines = ['', f'| {" | ".join(names)} |', f'|---|{"---:|" * (len(names) - 1)}']
    for row in rows:
        numbers = [f'{row["correlation"]:+.2f}', *(f'{row[name]:.1f}' for name in ('gap', 'largest', 'joint'))]
        cells = [row['criterion'], *numbers, str(row['block evaluations']), f'{row["seconds"]:.0f}']
        lines.append(f'| {" | ".join("-" if "nan" in cell else cell for cell in cells)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    cli.run(main)

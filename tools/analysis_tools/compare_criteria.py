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
#: What `--settings` varies, one at a time.
SETTINGS = dict(
    num_views=(3, 4, 8), pool=(1, 2, 4, [1, 4]), shrinkage=(0.03, 0.3),
    views=(dict(crop=0.1), dict(colour=0.4, blur=1.0)),
)  # fmt: skip
IMAGES = (32, 64, 128, 512, 912)


def parse_args():
    parser = cli.base_parser(__doc__)
    parser.add_argument('--blocks', type=int, nargs='+', help='blocks to compare; default: that of the config')
    parser.add_argument('--components', nargs='+', help='likewise')
    parser.add_argument('--noise', nargs='+', choices=('fixed', 'fresh'), default=['fixed', 'fresh'])
    parser.add_argument(
        '--settings', action='store_true',
        help="vary the settings of the config's criterion on views, one at a time, instead of comparing criteria",
    )  # fmt: skip
    parser.add_argument('--latents', help='a safetensors file that keeps latents, for further runs and other models')
    cli.add_selection(parser)
    return parser.parse_args()


def list_criteria(hook):
    """All of them; those that read views read those of the config's criterion."""
    views = {name: value for name, value in hook.config.items() if name in ('num_views', 'views')}
    pools = [hook.config.get('pool', (1, 2)), (1, 2), 1, 2, 4]
    pools = dict.fromkeys(tuple(one) if isinstance(one, (list, tuple)) else one for one in pools)
    entries = [dict(type='InstanceInformation', pool=one, **views) for one in pools]
    entries += [dict(type=name, **views) for name in ('ViewConsistency', 'RankMe', 'LiDAR')]
    entries += [dict(type='NoiseConsistentHFR', centred=centred) for centred in (True, False)]
    entries += [dict(type='HighFrequencyRatio', sigma=sigma, norm=norm) for norm in (2, 1) for sigma in SIGMAS]
    return [*entries, dict(type='FisherScore')]


def list_settings(hook, most):
    """The criterion of the config and its neighbours: searches as (images, criteria by name).

    One search has one kind of views, which all its criteria share. There are `most` images.
    """
    base, views = hook.config, hook.config.get('views', {})
    same_views = {
        f'{name}={one}': dict(base, **{name: one}) for name in ('pool', 'shrinkage') for one in SETTINGS[name]
    }
    # Apart, because cells times views times images are kept for every tap and timestep.
    changed = [(hook.num_images, {f'num_views={one}': dict(base, num_views=one)}) for one in SETTINGS['num_views']]
    changed += [
        (hook.num_images, {f'views with {one}': dict(base, views={**views, **one})}) for one in SETTINGS['views']
    ]
    numbers = [
        (number, {f'num_images={number}': base})
        for number in dict.fromkeys(min(number, most) for number in IMAGES)
        if number != min(hook.num_images, most)
    ]
    return [(hook.num_images, {'as configured': base, **same_views}), *changed, *numbers]


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
    from mmaselect.evaluation.verdict import judge_probe, judge_rule
    from mmaselect.hooks.images import find_backbone

    runner, hook = cli.build_selection(cfg, args)
    if args.settings:
        searches = list_settings(hook, len(runner.train_dataloader.dataset))
    else:
        searches = [(hook.num_images, dict(enumerate(list_criteria(hook))))]
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
        for num_images, entries in searches:
            rows += search(runner, hook, taps, num_images, entries, found.accuracy)
            memory.save()
        others = {f'always {rule}': judge_rule(rule, found.accuracy, timesteps) for rule in RULES}
        others['the probe, by halves of the test images'] = judge_probe(found.halves, timesteps)
        for name, verdict in others.items():
            rows.append({'noise': policy, 'criterion': name, **vars(verdict), 'block evaluations': 0, 'seconds': 0.0})
        print(table([row for row in rows if row['noise'] == policy]), flush=True)
        print(
            f'\n{len(taps)} taps, {len(timesteps)} timesteps, {hook.num_images} images where a row does not say '
            f'otherwise; a criterion is given the seconds of its share of the passes; probes: '
            f'{found.block_evaluations} block evaluations, {found.feature_seconds + found.probe_seconds:.0f} s'
        )
    path = Path(runner.work_dir) / ('settings.csv' if args.settings else 'criteria.csv')
    write_csv(path, [{**row, 'picks': ' '.join(f'{pick:g}' for pick in row['picks'])} for row in rows])
    print(path)


def search(runner, hook, taps, num_images, entries, accuracy):
    """One search for several criteria, a row for each; named by their labels where `entries` only counts them."""
    from mmaselect.evaluation.verdict import judge
    from mmaselect.hooks.images import find_backbone
    from mmaselect.selection.search import count_passes

    criteria, backbone = list(entries.values()), find_backbone(runner)
    hook = type(hook)(
        **{name: getattr(hook, name) for name in ('timesteps', 'batch_size', 'pipeline', 'seed')},
        num_images=num_images, criterion=criteria[0], compare=criteria[1:],
    )  # fmt: skip
    started = time.perf_counter()
    selection, _ = hook.score(runner, [(tap,) for tap in taps])
    seconds = time.perf_counter() - started
    sweep, rows, names = selection.sweep, [], iter(entries)
    for label, criterion in hook.criteria.items():
        draws, views = count_passes([criterion])
        evaluations = sweep.num_images * len(hook.timesteps) * backbone.diffusion.num_blocks * (draws + views - 1)
        name = next(names)
        rows.append({
            'noise': backbone.noise, 'criterion': name if isinstance(name, str) else label,
            **vars(judge(sweep.scores[label], accuracy, hook.timesteps)), 'block evaluations': evaluations,
            'seconds': round(seconds * evaluations / sweep.block_evaluations, 1),
        })  # fmt: skip
    return rows


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

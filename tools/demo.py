"""The demo: digits, a frozen DiT, a selected timestep, a trained head, and what other timesteps would have given.

What an earlier demo has computed is used again, where it was computed from the same.
"""

import argparse
import contextlib
import json
import os
import runpy
import sys
import time
import warnings
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / 'configs' / 'demo' / 'dit-nano_linear_bs64-20e_digits-16px.py'
IMAGES = {'train': 1200, 'test': 597}
NOISES = ('fixed', 'fresh')
INTRODUCTION = """\
mmaselect: features of a frozen diffusion model, at a timestep that is selected without labels.
The model is a DiT of five blocks that comes with the package; the images are scikit-learn's digits.
"""
NEXT = """\
What to try next:
  mmaselect doctor                                  what works on this machine
  mmaselect select {config} --cfg-options {option}
                                                    the selection alone, of all blocks
  docs/                                             your own images, weights and heads
"""
#: Of the stack below, and nothing that anybody could do something about.
HARMLESS = (
    'pkg_resources is deprecated',
    'The prefix is not set in metric class',
    'Failed to load image Python extension',
)


#: What is said goes here, and what the stack below prints goes nowhere.
OUT = sys.stdout


def say(text):
    print(text, file=OUT, flush=True)


def prepare(folder):
    """Writes the digits, unless they are there."""
    found = {split: len(list(folder.glob(f'{split}/*/*.png'))) for split in IMAGES}
    if found != IMAGES:
        arguments, sys.argv = sys.argv, ['prepare_digits.py', str(folder)]
        with contextlib.redirect_stdout(None):
            runpy.run_path(str(TOOLS / 'dataset_converters' / 'prepare_digits.py'), run_name='__main__')
        sys.argv = arguments
    say(f'\n1/4 Images: {IMAGES["train"]} to train on and {IMAGES["test"]} to test on, in {folder}')


def read_config(work_dir):
    from mmaselect import cli

    cfg = cli.read_config(str(CONFIG))
    # At this tap the best timestep lies inside.
    cfg.model.backbone.update(block=3, component='output', cache=dict(dir=str(work_dir / 'features')))
    cfg.custom_hooks.append(dict(type='FeatureCacheHook'))
    cfg.train_cfg.val_interval = cfg.train_cfg.max_epochs
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(work_dir / 'digits')
    cfg.work_dir = str(work_dir)
    return cli.finish_config(cfg, argparse.Namespace(cfg_options=None, no_pin_memory=False))


def resume(cfg, work_dir):
    """Goes on from what an earlier demo has left, if config and versions are the same; says whether they are."""
    from importlib import metadata

    from mmaselect import cli
    from mmaselect.files import write_json

    versions = {name: metadata.version(name) for name in ('mmaselect', 'torch', 'diffusers', 'mmengine', 'mmpretrain')}
    request = {'config': cfg.pretty_text, 'versions': versions}
    file = work_dir / 'demo.json'
    with contextlib.suppress(OSError, ValueError):
        if json.loads(file.read_text(encoding='utf-8')) == request:
            cli.merge_resume(cfg, 'auto')
            return True
    (work_dir / 'probes.json').unlink(missing_ok=True)
    write_json(file, request)
    return False


def make_hook():
    from mmengine.hooks import Hook

    from mmaselect.hooks.images import find_backbone
    from mmaselect.progress import progress_bar

    class DemoHook(Hook):
        """Says what was selected, and draws the bar of the training."""

        # Between the selection and the cache.
        priority = 80

        def before_train(self, runner):
            backbone = find_backbone(runner)
            (timestep,), (tap,) = backbone.timesteps, backbone.taps
            say(f'    timestep {timestep:g} of block {tap.block}, {tap.component}')
            say('3/4 Head: a linear layer on the features there')
            left = runner.max_iters - runner.iter
            self.bar = progress_bar(total=left, desc='linear head', unit='step', disable=not left)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.bar.update()

        def after_train(self, runner):
            self.bar.close()

    return DemoHook()


def print_table(selection, accuracy):
    from rich.table import Table

    from mmaselect.selection.report import render

    sweep, (fixed, fresh) = selection.sweep, (accuracy[noise] for noise in NOISES)
    hfr = next(label for label in sweep.scores if label.startswith('HFR'))
    table = Table()
    for name in ('timestep', 'HFR', 'instance\ninformation', 'probe accuracy,\nfixed noise',
                 'probe accuracy,\nfresh noise', ''):  # fmt: skip
        table.add_column(name, justify='left' if not name else 'right')
    for row, timestep in enumerate(sweep.timesteps):
        notes = []
        if timestep == selection.timestep:
            notes.append('<- selected')
        if timestep == selection.choices[hfr]:
            notes.append('<- plain HFR')
        if fixed[row] == max(fixed):
            notes.append('<- best')
        scores = [f'{sweep.curve(label)[row]:.4f}' for label in (hfr, selection.criterion)]
        table.add_row(f'{timestep:g}', *scores, f'{fixed[row]:.1f} %', f'{fresh[row]:.1f} %', ' '.join(notes))
    say(render(table))
    selected, plain = (sweep.timesteps.index(choice) for choice in (selection.timestep, selection.choices[hfr]))
    for noise, accuracies in accuracy.items():
        say(
            f'{noise} noise: {accuracies[selected]:.1f} % at the selected timestep {selection.timestep:g}, '
            f'{accuracies[plain]:.1f} % at {sweep.timesteps[plain]:g} that plain HFR would have chosen, '
            f'{min(accuracies):.1f} to {max(accuracies):.1f} % over all {len(accuracies)}'
        )


def demo(work_dir):
    started = time.perf_counter()
    from mmaselect import cli
    from mmaselect.evaluation.probe import probe
    from mmaselect.selection.report import Selection, plot, read_selection

    prepare(work_dir / 'digits')
    cfg = read_config(work_dir)
    again = resume(cfg, work_dir)
    say('2/4 Selection: every timestep is scored on 256 of the images, without labels')
    # mmengine's log goes to its file: the handler for the terminal keeps what is standard output while it is made.
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        runner = cli.build_runner(cfg, 'train_dataloader', 'val_dataloader')
        runner.register_hook(make_hook())
        runner.train()
        (head,) = runner.test().values()
        for handler in list(runner.logger.handlers):
            if getattr(handler, 'stream', None) is nowhere:
                runner.logger.removeHandler(handler)
    say(f'    {head:.1f} % of the test images are right')
    say('4/4 Probes: what other timesteps would have given, under one noise for all images and one for each')
    selection = Selection.from_dict(read_selection(work_dir / 'selection.json'))
    probes = [
        probe(runner, selection.sweep.timesteps, selection.taps, noise, store=work_dir / 'probes.json')
        for noise in NOISES
    ]
    accuracy = {noise: one.accuracy[selection.taps[0]] for noise, one in zip(NOISES, probes)}
    picture = work_dir / 'demo.png'
    plot(selection, picture, accuracy['fixed'])
    say('')
    print_table(selection, accuracy)
    say(f'\npicture: {picture}; the selection as a page: {work_dir / "report.html"}; log: {runner.log_dir}')
    say(f'{time.perf_counter() - started:.0f} s{", with what an earlier demo has computed from the same" * again}\n')
    option = 'model.backbone.block=auto'
    say(NEXT.format(config=os.path.relpath(CONFIG), option=option, work_dir=work_dir))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', default='work_dirs/demo')
    args = parser.parse_args()
    # Before the imports, which take seconds.
    say(INTRODUCTION.rstrip())
    for message in HARMLESS:
        warnings.filterwarnings('ignore', message=f'.*{message}')
    import mmaselect  # noqa: F401  (repairs the stack before anything else is imported)
    from mmaselect import cli

    cli.run(lambda: demo(Path(args.work_dir)))


if __name__ == '__main__':
    main()

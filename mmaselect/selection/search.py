"""The search: timesteps, and where asked for blocks and components, scored on the same images under the same noises."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmaselect.diffusion.memory import Halving
from mmaselect.diffusion.noise import NOISES, seeded_noise
from mmaselect.diffusion.reader import FrozenDiffusion
from mmaselect.diffusion.taps import Tap
from mmaselect.errors import InputError, check_choice, check_timestep, naming, unknown
from mmaselect.images import GROUP, Batch
from mmaselect.selection.bootstrap import (
    BINS,
    Choice,
    choose,
    drop_doubtful,
    interval,
    jackknife,
    resample,
    resample_influences,
)
from mmaselect.selection.coarse import coarse_to_fine
from mmaselect.selection.coverage import greedy, overlap, sketch
from mmaselect.selection.criterion import Criterion, SummedCriterion, Sums, add_sums
from mmaselect.selection.features import Features
from mmaselect.selection.instance import ViewCriterion
from mmaselect.selection.racing import survivors
from mmaselect.threads import MOST, side_by_side

SEARCHES = ('sweep', 'coarse-to-fine', 'racing')


@dataclass
class SearchResult:
    """Result of a search.

    Attributes:
        timesteps: What was tried, ascending.
        scores: Score of each criterion (by its label) at each tap and timestep.
        choices: What each criterion chooses.
        intervals: 95 % bootstrap interval (low, high) of each score; a criterion that cannot be resampled has none.
        num_images: Images over all ranks.
        block_evaluations: Images x timesteps x noises x blocks, over all ranks.
        encoder_runs: Images that went through the latent encoder, over all ranks.
        seconds: Wall time of this rank.
        search: How it was searched, in words.
        noise: Policy of the noise, see :class:`Search`.
        dropped: Timesteps that a race left behind, each with the number of images it had got.
    """

    timesteps: list[float]
    scores: dict[str, dict[Tap, list[float]]]
    choices: dict[str, Choice]
    intervals: dict[str, dict[Tap, list[list[float]]]] = field(default_factory=dict)
    num_images: int = 0
    block_evaluations: int = 0
    encoder_runs: int = 0
    seconds: float = 0.0
    search: str = 'sweep'
    noise: str = 'fixed'
    dropped: dict[float, int] = field(default_factory=dict)

    def curve(self, label: str, taps: Sequence[Tap] | None = None) -> list[float]:
        """Score of a criterion over timesteps, averaged over taps, by default those it chooses."""
        taps = self.choices[label].taps if taps is None else taps
        return torch.tensor([self.scores[label][tap] for tap in taps], dtype=torch.float64).mean(0).tolist()

    def choice(self, label: str) -> float:
        """The timestep that a criterion chooses; of several the best."""
        return self.choices[label].timesteps[0]


class Ranks(Protocol):
    """What a search needs from a process group; every rank makes the same calls in the same order.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
    """

    rank: int
    world_size: int

    def add(self, sums: Sums) -> Sums:
        """Adds the entries of all ranks; an entry that a rank lacks counts as zero."""
        ...

    def gather(self, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Brings the rows of all ranks together, in the order of their groups, on every rank."""
        ...

    def check(self, error: str | None) -> None:
        """Raises :class:`InputError` on every rank if one of them brings an error."""
        ...

    def collect(self, entries: list[Any]) -> list[Any]:
        """Brings the entries of all ranks together, on every rank."""
        ...


class OneProcess:
    """A process group of one."""

    rank, world_size = 0, 1

    def add(self, sums: Sums) -> Sums:
        """Gives back the sums."""
        return sums

    def gather(self, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Gives them back."""
        return rows, groups

    def check(self, error: str | None) -> None:
        """Raises the error, if there is one."""
        if error is not None:
            raise InputError(error)

    def collect(self, entries: list[Any]) -> list[Any]:
        """Gives them back."""
        return entries


def make_timesteps(timesteps: dict | Sequence[float]) -> list[float]:
    """Reads the ``timesteps`` of a config.

    Args:
        timesteps: ``dict(start=0, stop=1000, num=21)``, both ends included, or a list of numbers.

    Returns:
        Ascending timesteps in [0, 1000], each once.

    Raises:
        InputError: If there are none, or one lies outside 0-1000.
    """
    if isinstance(timesteps, dict):
        extra = set(timesteps) - {'start', 'stop', 'num'}
        if extra or len(timesteps) != 3:
            raise InputError(f'timesteps={dict(timesteps)!r} is not valid: give start, stop and num, or a list')
        num = timesteps['num']
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise InputError(f'timesteps.num={num!r} is not valid: give a whole number of at least 1')
        start = check_timestep(timesteps['start'], 'timesteps.start')
        stop = check_timestep(timesteps['stop'], 'timesteps.stop')
        values = torch.linspace(start, stop, num, dtype=torch.float64).tolist()
    elif isinstance(timesteps, (list, tuple)):
        values = [check_timestep(value, 'timesteps') for value in timesteps]
    else:
        raise InputError(f'timesteps={timesteps!r} is not valid: give dict(start=0, stop=1000, num=21), or a list')
    if not values:
        raise InputError('timesteps=[] is not valid: give at least one')
    return sorted(set(values))


def count_passes(criteria: Sequence[Criterion], num_timesteps: int = 1) -> tuple[int, int]:
    """Noises of an image, and views of it, the image itself among them, that criteria need at every timestep."""
    draws = max([criterion.draws for criterion in criteria] + [2 if num_timesteps > 1 else 1])
    return draws, max([one.num_views for one in criteria if isinstance(one, ViewCriterion)], default=1)


class Search:
    """Gathers sums of images; images may come in portions and timesteps in turns.

    Noise is common to all timesteps, so that curves differ by the timestep alone, and independent over draws. It should
    be the noise that the head will see. Every pass fills a column: all taps of a timestep, each map reduced to its sums
    as soon as the block that makes it has run. A criterion that reads views keeps pooled features instead of sums.

    Args:
        model: The frozen model; its taps are scored.
        timesteps: What may be tried, ascending, each in [0, 1000].
        criteria: What to compute; one pass per noise serves them all. The first one decides.
        alternatives: Sets of taps of which one is to be chosen; by default there is one, all taps.
        num_timesteps: How many timesteps to choose; more than one needs a second noise, to know what they share.
        seed: Of the fresh noises, of the views and of the bootstrap.
        on_pass: Called after every forward pass, for a progress bar.
        keep: Keep the latents (float32, on the CPU), so that further timesteps need no second encoding.
        ranks: The process group.
        noise: ``'fixed'``: all images and views have one noise, as ``ASelectDiT`` gives them by default; ``'fresh'``:
            each has its own.
        noise_seed: Of the fixed noise.
        name: What an error calls an image, by its index.

    Attributes:
        passes: Forward passes per image and timestep: noises of the image itself, and one for each further view.

    Raises:
        InputError: If there are fewer timesteps than are to be chosen, or criteria ask for different views.
    """

    def __init__(
        self,
        model: FrozenDiffusion,
        timesteps: Sequence[float],
        criteria: Sequence[Criterion],
        alternatives: Sequence[Sequence[Tap]] | None = None,
        num_timesteps: int = 1,
        seed: int = 0,
        on_pass: Callable[[], object] | None = None,
        keep: bool = False,
        ranks: Ranks | None = None,
        noise: str = 'fixed',
        noise_seed: int = 0,
        name: Callable[[int], str] = 'image {}'.format,
    ) -> None:
        self.name = name
        self.noise, self.noise_seed = check_choice(noise, 'noise', NOISES), noise_seed
        if num_timesteps > len(timesteps):
            raise InputError(
                f'num_timesteps={num_timesteps} is more than the {len(timesteps)} timesteps to choose from'
            )
        self.model, self.timesteps, self.criteria = model, list(timesteps), list(criteria)
        self.taps = list(dict.fromkeys(model.family.taps))
        self.alternatives = [list(taps) for taps in alternatives or [self.taps]]
        self.num_timesteps, self.seed, self.on_pass, self.keep = num_timesteps, seed, on_pass, keep
        self.ranks = ranks or OneProcess()
        self.draws, self._num_views = count_passes(criteria, num_timesteps)
        views = {criterion.views: criterion.label for criterion in criteria if isinstance(criterion, ViewCriterion)}
        if len(views) > 1:
            raise InputError(f'{" and ".join(views.values())} ask for different views: give all the same')
        self._views = next(iter(views), None)
        self.passes = self.draws + self._num_views - 1
        shape = (len(self.timesteps), len(self.taps))
        self._binned = {
            number: torch.zeros(*shape, len(criterion.fields), BINS, dtype=torch.float64)
            for number, criterion in enumerate(self.criteria)
            if isinstance(criterion, SummedCriterion) and criterion.fields is not None
        }
        # By what is kept (criteria that pool alike share it), timestep and tap: the groups and rows of each batch.
        self._rows: dict[tuple[tuple, int, int], list[tuple[Tensor, Tensor]]] = {}
        # By criterion, timestep, tap and number of images: they are scored once, however often the search looks.
        self._judged: dict[tuple[int, int, int, int], tuple[float, Tensor | None]] = {}
        self._free: dict[tuple[int, int, int], Sums] = {}
        self._shared = torch.zeros(len(self.taps), len(self.timesteps) + 1, len(self.timesteps), dtype=torch.float64)
        self._counts = torch.zeros(3, dtype=torch.float64)  # images, block evaluations, encoder runs
        self._kept: list[tuple[Tensor, Batch]] = []
        self._halving = Halving(self._work, _halve, lambda part: len(part.batch))
        self.evaluated: set[int] = set()
        self._images = 0
        self._seconds = 0.0

    # --- gathering -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, batches: Iterable[Batch], positions: Sequence[int]) -> None:
        """Encodes this rank's images and runs them at some of the timesteps.

        Args:
            batches: Images that were not seen before.
            positions: Positions in ``timesteps``.

        Raises:
            InputError: If a criterion needs labels that are not there, or if features are not finite; on all ranks.
        """
        self._guard(lambda: self._add(batches, positions))
        self.evaluated |= set(positions)

    @torch.no_grad()
    def extend(self, positions: Sequence[int]) -> None:
        """Runs the images seen so far at further timesteps; needs ``keep``.

        Args:
            positions: Positions in ``timesteps`` that were not run before.
        """

        def run() -> None:
            for latent, batch in self._kept:
                self._halving(Part(batch, latent, positions))

        self._guard(run)
        self.evaluated |= set(positions)

    def _guard(self, work: Callable[[], None]) -> None:
        # A rank that stopped alone would leave the others waiting in the reduction.
        started, error, failed = time.perf_counter(), None, None
        try:
            work()
        except InputError as caught:
            error = str(caught)
        except Exception as caught:
            error, failed = f'a rank stopped: {type(caught).__name__}: {caught}', caught
        try:
            self.ranks.check(error)
        except InputError as line:
            # Where it happened, with its traceback.
            raise line if failed is None else failed from None
        self._seconds += time.perf_counter() - started

    def _add(self, batches: Iterable[Batch], positions: Sequence[int]) -> None:
        for batch in batches:
            missing = [
                criterion.label for criterion in self.criteria if criterion.needs_labels and batch.labels is None
            ]
            if missing:
                raise InputError(
                    f'criterion {missing[0]!r} needs labels; these images have none, or not one class each'
                )
            if batch.groups is None:
                batch.groups = [(self._images + position) // GROUP for position in range(len(batch.indices))]
            self._images += len(batch.indices)
            self._halving(Part(batch.padded(self.model.multiple), None, positions))

    def _encode(self, batch: Batch, positions: Sequence[int]) -> None:
        images = [batch.images.to(self.model.device)]
        if self._views is not None:
            images += [self._views(images[0], batch.indices, self.seed, n) for n in range(1, self._num_views)]
        latent = torch.stack([self.model.encode(view) for view in images], 1)
        self._counts += torch.tensor([len(batch.indices), 0, len(batch.indices) * len(images)])
        if self.keep:
            self._kept.append((latent.float().cpu(), replace(batch, images=latent.new_empty(0))))
        self._run(latent, batch, positions)

    def _work(self, part: Part) -> None:
        """Does the work of a part of a batch, or nothing of it if memory does not suffice."""
        before = self._snapshot()
        try:
            if part.latent is None:
                self._encode(part.batch, part.positions)
            else:
                self._run(part.latent.to(self.model.device), part.batch, part.positions)
        except RuntimeError:
            self._restore(before)
            raise

    def _snapshot(self) -> tuple:
        binned = {number: value.clone() for number, value in self._binned.items()}
        rows = {key: len(value) for key, value in self._rows.items()}
        return binned, dict(self._free), self._shared.clone(), self._counts.clone(), rows, len(self._kept)

    def _restore(self, state: tuple) -> None:
        self._binned, self._free, self._shared, self._counts, rows, kept = state
        for key, parts in self._rows.items():
            del parts[rows.get(key, 0) :]
        del self._kept[kept:]

    def _draw(self, shape: tuple[int, ...], indices: Sequence[int], draw: int) -> Tensor:
        """One noise for all of the images, or one for each."""
        if self.noise == 'fixed':
            # The first one is the backbone's.
            return seeded_noise(shape, self.noise_seed, *([draw] if draw else []))
        return torch.stack([seeded_noise(shape, self.seed, index, draw) for index in indices])

    def _run(self, latent: Tensor, batch: Batch, positions: Sequence[int]) -> None:
        """Runs images and their views, (B, views, C, H, W), at some of the timesteps."""
        shape = tuple(latent.shape[2:])
        image, *others = latent.unbind(1)
        # Fresh noises of views must not be those of the image, nor depend on the criteria beside; a fixed one is the
        # same for all.
        view_draws = [0 if self.noise == 'fixed' else max(2, self.draws) + n for n in range(len(others))]
        drawn = [self._draw(shape, batch.indices, draw) for draw in [*range(self.draws), *view_draws]]
        # One pass for all of them, so that one map per pass is all that is in memory.
        noise = torch.cat([one.expand(len(image), *shape) for one in drawn]).to(latent.device)
        inputs = torch.cat([image] * self.draws + others)
        names, groups = torch.tensor(batch.groups).unique(return_inverse=True)
        bins = names % BINS
        labels = None if batch.labels is None else batch.labels.to(latent.device)
        sketches: dict[int, list[Tensor]] = {number: [] for number in range(len(self.taps))}
        for position in positions:
            timestep = self.timesteps[position]

            def visit(tap: Tap, value: Tensor, position: int = position, timestep: float = timestep) -> None:
                number, maps = self.taps.index(tap), value.chunk(self.passes)
                features = Features(maps[: self.draws], groups, labels, maps[self.draws :])
                self._reduce(position, number, features, bins, names[groups])
                if self.num_timesteps > 1:
                    sketches[number].append(sketch(features))

            with naming(self.name, batch.indices):
                self.model.read(inputs, noise, timestep, visit)
            self._counts[1] += len(batch.indices) * self.passes * self.model.num_blocks
            for _ in range(self.passes):
                if self.on_pass is not None:
                    self.on_pass()
        if self.num_timesteps > 1:
            self._shared += torch.stack([overlap(sketches[number]).cpu() for number in range(len(self.taps))])

    def _reduce(self, position: int, number: int, features: Features, bins: Tensor, groups: Tensor) -> None:
        read = set()
        for which, criterion in enumerate(self.criteria):
            if isinstance(criterion, ViewCriterion):
                if criterion.kept not in read:
                    rows = criterion.rows(features)
                    self._rows.setdefault((criterion.kept, position, number), []).append((rows, groups))
                    read.add(criterion.kept)
                continue
            assert isinstance(criterion, SummedCriterion)
            sums = criterion.sums(features)
            if which in self._binned:
                values = torch.stack([sums[name] for name in criterion.names]).double().cpu()
                self._binned[which][position, number].index_add_(1, bins, values)
            else:
                key = (which, position, number)
                self._free[key] = add_sums(self._free.get(key, {}), {name: value.cpu() for name, value in sums.items()})

    # --- scoring -------------------------------------------------------------------------------------------------

    def drop(self, positions: Iterable[int]) -> None:
        """Leaves timesteps behind: images to come are not run at them, and :meth:`finish` no longer scores them."""
        self.evaluated -= set(positions)

    def finish(self, deciding: bool = False) -> SearchResult:
        """Brings the ranks together and scores what has been evaluated so far; may be called again after more of it.

        Args:
            deciding: Score by the deciding criterion alone.

        Returns:
            The scores and choices, the same on every rank.

        Raises:
            InputError: If there are no images.
        """
        started = time.perf_counter()
        dense = {f'binned/{number}': value for number, value in self._binned.items()}
        total = self.ranks.add({'counts': self._counts, 'shared': self._shared, **dense})
        images, block_evaluations, encoder_runs = (round(value) for value in total['counts'].tolist())
        if not images:
            raise InputError('selection has no images: the data set is empty')
        evaluated = sorted(self.evaluated)
        result = SearchResult([self.timesteps[position] for position in evaluated], {}, {}, noise=self.noise)
        result.num_images, result.block_evaluations, result.encoder_runs = images, block_evaluations, encoder_runs
        for which, criterion in enumerate(self.criteria[:1] if deciding else self.criteria):
            resampled = None
            if which in self._binned:
                assert isinstance(criterion, SummedCriterion)
                sums = total[f'binned/{which}'].cpu()[evaluated]
                whole = sums.sum(-1)
                scores = criterion.score({name: whole[..., n] for n, name in enumerate(criterion.names)})
                resampled = resample(criterion, sums, seed=self.seed)
                if resampled is not None:
                    scores, resampled = drop_doubtful(scores, resampled)
            elif isinstance(criterion, ViewCriterion):
                scores, resampled = self._score_rows(which, criterion, evaluated, images)
            else:
                assert isinstance(criterion, SummedCriterion)
                scores = self._score_free(which, criterion, evaluated)
            result.scores[criterion.label] = dict(zip(self.taps, scores.T.tolist()))
            if resampled is not None:
                bounds = interval(resampled).transpose(0, 1).tolist()
                result.intervals[criterion.label] = dict(zip(self.taps, bounds))
            result.choices[criterion.label] = self._choose(result.timesteps, scores, resampled, total['shared'].cpu())
        result.seconds = self._seconds + time.perf_counter() - started
        return result

    def _score_rows(
        self, which: int, criterion: ViewCriterion, evaluated: Sequence[int], images: int
    ) -> tuple[Tensor, Tensor | None]:
        """Scores and resampled scores of a criterion that reads all images at once, a timestep and tap at a time."""
        keys = [(which, position, number, images) for position in evaluated for number in range(len(self.taps))]
        todo = [key for key in keys if key not in self._judged]
        judge = functools.partial(jackknife, criterion.score, leave_out=criterion.leave_out)
        with side_by_side() as threads:
            # A few at a time: rows that are brought together are a copy.
            for first in range(0, len(todo), MOST):
                some = todo[first : first + MOST]
                rows = [self._gather(criterion, position, number) for _, position, number, _ in some]
                self._judged.update(zip(some, threads.map(judge, *zip(*rows))))
        judged = [self._judged[key] for key in keys]
        shape = (len(evaluated), len(self.taps))
        scores = torch.tensor([score for score, _ in judged], dtype=torch.float64).view(shape)
        known = [influences for _, influences in judged if influences is not None]
        if len(known) < len(judged):
            return scores, None
        return drop_doubtful(scores, resample_influences(scores, torch.stack(known).view(*shape, -1), seed=self.seed))

    def _gather(self, criterion: ViewCriterion, position: int, number: int) -> tuple[Tensor, Tensor]:
        """Rows of all images and their groups, from all ranks."""
        # A rank may have had no images.
        kept = self._rows.get((criterion.kept, position, number)) or [(torch.empty(0), torch.empty(0).long())]
        return self.ranks.gather(*(torch.cat(parts) for parts in zip(*kept)))

    def _score_free(self, which: int, criterion: SummedCriterion, evaluated: Sequence[int]) -> Tensor:
        rows = [
            [
                float(criterion.score(self.ranks.add(self._free.get((which, position, number), {}))))
                for number in range(len(self.taps))
            ]
            for position in evaluated
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def _choose(self, timesteps: list[float], scores: Tensor, resampled: Tensor | None, shared: Tensor) -> Choice:
        members = [[self.taps.index(tap) for tap in taps] for taps in self.alternatives]
        by_alternative = torch.stack([scores[:, numbers].mean(1) for numbers in members])
        draws = None if resampled is None else torch.stack([resampled[:, numbers].mean(1) for numbers in members])
        blocks = [max(tap.block for tap in taps) for taps in self.alternatives]
        alternative, position, drawn = choose(by_alternative, draws, blocks)
        chosen = [position]
        if self.num_timesteps > 1:
            shared = shared[members[alternative]].mean(0)
            chosen = greedy(by_alternative[alternative].clamp_min(0).tolist(), shared, position, self.num_timesteps)
        choice = Choice([timesteps[number] for number in chosen], list(self.alternatives[alternative]))
        if drawn is not None:
            same = (drawn[:, 0] == alternative) & (drawn[:, 1] == position)
            choice.agreement = same.double().mean().item()
            counts = torch.bincount(drawn[:, 1], minlength=len(timesteps)).tolist()
            choice.resamples = {timestep: count / len(drawn) for timestep, count in zip(timesteps, counts) if count}
        return choice


def run(
    finder: Search,
    portions: Iterable[Iterable[Batch]],
    search: str = 'sweep',
    stability: float | None = None,
) -> SearchResult:
    """Searches.

    Args:
        finder: Fresh; of ``'coarse-to-fine'`` one that keeps latents.
        portions: This rank's images, in one or several portions.
        search: ``'sweep'`` tries every timestep; ``'coarse-to-fine'`` at most a third of them, unless the curve of
            the deciding criterion (over the best alternative at each timestep) is flat or has several peaks;
            ``'racing'`` begins with all of them, and drops after each portion of images those that can no longer win,
            see :mod:`~mmaselect.selection.racing`.
        stability: Take no further portion once this share of resamples agrees with the choice; None takes them all.

    Returns:
        The result.

    Raises:
        InputError: If ``search`` is unknown or does not fit, if there are no images, or features are not finite.
    """
    if search not in SEARCHES:
        raise unknown('search', search, SEARCHES)
    if search != 'sweep' and finder.num_timesteps > 1:
        raise InputError(f"search={search!r} finds one timestep: choosing several needs search='sweep'")
    label = finder.criteria[0].label
    looks = stability is not None or search == 'racing'
    if looks and getattr(finder.criteria[0], 'fields', ()) is None:
        asked = "num_images='auto'" if search != 'racing' else "search='racing'"
        raise InputError(f'{asked} needs a criterion that can be resampled; {label} cannot')
    dropped: dict[float, int] = {}

    def start(positions: list[int]) -> None:
        last: SearchResult | None = None
        for portion in portions:
            if last is not None and search == 'racing':
                stay = survivors(last.timesteps, last.choices[label])
                gone = [position for position in positions if finder.timesteps[position] not in stay]
                dropped.update({finder.timesteps[position]: last.num_images for position in gone})
                finder.drop(gone)
                positions = [position for position in positions if position not in gone]
            finder.add(portion, positions)
            if not looks:
                continue
            last = finder.finish(deciding=True)
            agreement = last.choices[label].agreement
            if stability is not None and agreement is not None and agreement >= stability:
                return

    if search != 'coarse-to-fine':
        start(list(range(len(finder.timesteps))))
        result = finder.finish()
        if search == 'sweep':
            return result
        done = f'racing: {len(result.timesteps)} of {len(finder.timesteps)} timesteps on all images'
        return replace(result, search=done, dropped=dict(sorted(dropped.items())))
    if not finder.keep:
        raise InputError("search='coarse-to-fine' needs keep=True")

    state: SearchResult | None = None

    def evaluate(positions: list[int]) -> dict[int, float]:
        nonlocal state
        if finder.evaluated:
            finder.extend(positions)
        else:
            start(positions)
        state = finder.finish()
        curves = [state.curve(label, taps) for taps in finder.alternatives]
        return dict(zip(sorted(finder.evaluated), map(max, zip(*curves))))

    done = coarse_to_fine(len(finder.timesteps), evaluate, finder.timesteps)
    return replace(finder.finish() if state is None else state, search=done)


def sweep(
    model: FrozenDiffusion,
    batches: Iterable[Batch],
    timesteps: Sequence[float],
    criteria: Sequence[Criterion],
    seed: int = 0,
    on_pass: Callable[[], object] | None = None,
    noise: str = 'fixed',
    noise_seed: int = 0,
) -> SearchResult:
    """Scores every timestep on all images, in one process; arguments as of :class:`Search`."""
    search = Search(model, timesteps, criteria, seed=seed, on_pass=on_pass, noise=noise, noise_seed=noise_seed)
    return run(search, [batches])


class Part(NamedTuple):
    """A batch, or some of its groups, with its latents (B, views, C, H, W) once it is encoded, and where to run it."""

    batch: Batch
    latent: Tensor | None
    positions: Sequence[int]


def _halve(part: Part) -> list[Part] | None:
    """Splits in the middle of the groups; a single group must stay together."""
    batch, latent = part.batch, part.latent
    named = list(batch.groups or ())
    groups = list(dict.fromkeys(named))
    if len(groups) == 1:
        return None
    first = set(groups[: len(groups) // 2])
    halves = []
    for inside in (True, False):
        places = [place for place, group in enumerate(named) if (group in first) == inside]
        half = replace(
            batch,
            images=batch.images[places] if len(batch.images) else batch.images,
            indices=[batch.indices[place] for place in places],
            labels=None if batch.labels is None else batch.labels[places],
            groups=[named[place] for place in places],
        )
        halves.append(part._replace(batch=half, latent=None if latent is None else latent[places]))
    return halves

"""Where the files of a model are: a folder, one file, or the hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mmaselect.errors import InputError, one_line

#: Prefix of the models that come inside the package.
EMBEDDED = 'mmaselect://'
WEIGHTS = 'diffusion_pytorch_model'
#: Files of weights, as they are preferred. What is no safetensors is a pickle, read with ``weights_only=True``.
SUFFIXES = ('.safetensors', '.bin', '.ckpt', '.pt', '.pth')
#: Names of the weights in a diffusers folder: such a file beside its config stands for the folder.
PLAIN = [f'{WEIGHTS}{suffix}' for suffix in SUFFIXES[:2]]
ID = r'(?P<id>\w[\w.-]*/\w[\w.-]*)'
HUB_ID = re.compile(rf'{ID}(?:@(?P<revision>[\w./-]+))?')
HUB_URL = re.compile(
    rf'(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/{ID}'
    r'(?:/(?P<kind>tree|blob|resolve)/(?P<revision>[^/?]+)(?:/(?P<path>[^?]+))?)?/?(?:\?.*)?'
)


logger = logging.getLogger('mmaselect')


class Source:
    """The files of a model.

    Args:
        pretrained: A diffusers folder; a file of weights; a hub id (``'stabilityai/stable-diffusion-3.5-medium'``,
            ``'owner/name@revision'``) or the address of its page, of a folder or of a file of it; or the name of a
            model inside this package (``'mmaselect://dit-nano_digits'``).
        field: Name of the config field, for messages.
        revision: Branch, tag or commit on the hub.
        subfolder: Where the model is in it.
        token: For the hub; None for the one of ``hf auth login`` or ``HF_TOKEN``.
        cache_dir: Of the hub's client; None for its default.
        local_files_only: Read what the cache has, without asking the hub.

    Attributes:
        name: As given.
        folder: On this machine; None for the hub.
        repository: On the hub; None for a folder.
        single: The one file that holds the model, below ``folder`` or in the repository; None for a model folder.
        subfolder: With slashes, or empty.

    Raises:
        InputError: If it is neither a folder nor a file nor of the form of a hub id.
    """

    def __init__(
        self,
        pretrained: str | Path,
        field: str = 'pretrained',
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.name = str(pretrained)
        self.field = field
        self.revision = revision
        self.subfolder = (subfolder or '').strip('/')
        self.folder: Path | None = None
        self.repository: str | None = None
        self.single: str | None = None
        self._options: dict[str, Any] = {'token': token, 'cache_dir': cache_dir, 'local_files_only': local_files_only}
        self._found: dict[str, Path | None] = {}
        #: Why the hub was not asked, where only its cache was.
        self._offline: str | None = None
        path = Path(self.name).expanduser()
        if self.name.startswith(EMBEDDED):
            path = Path(__file__).parents[1] / 'assets' / self.name.removeprefix(EMBEDDED)
        if path.is_dir():
            self.folder = path
        elif path.is_file() and path.name in PLAIN and path.with_name('config.json').is_file():
            self.folder = path.parent
        elif path.is_file():
            self.folder, self.single = path.parent, path.name
        else:
            self._parse_hub()
        if (self.single or '').endswith('.gguf'):
            raise InputError(f'{field}={self.name!r} is GGUF, which is quantised: give the unquantised model')
        if self.single and not self.single.endswith(SUFFIXES):
            raise InputError(f'{field}={self.name!r} is not a file of weights: give one of {", ".join(SUFFIXES)}')

    def _parse_hub(self) -> None:
        address = HUB_URL.fullmatch(self.name)
        found = address or HUB_ID.fullmatch(self.name)
        if found is None or (address is None and self.name.endswith((*SUFFIXES, '.gguf'))):
            raise InputError(
                f'{self.field}={self.name!r} is not a folder (a diffusers model folder or a hub id is expected) and '
                'not a file'
            )
        self.repository = found['id']
        inside = unquote(found['revision']) if found['revision'] else None
        if inside is not None and self.revision not in (None, inside):
            raise InputError(f'revision={self.revision!r} is not that of {self.field}={self.name!r}: give one of them')
        self.revision = inside or self.revision
        path = unquote((address and address['path']) or '').strip('/')
        if path and address and address['kind'] == 'tree':
            self.subfolder = '/'.join(filter(None, (path, self.subfolder)))
        elif path:
            self.single = path

    def join(self, *parts: str) -> str:
        """The path of a file of the model, below its subfolder."""
        return '/'.join(filter(None, (self.subfolder, *parts)))

    def find(self, path: str) -> Path | None:
        """Finds a file of the model, downloading it if the model is on the hub.

        Args:
            path: Path inside the folder or repository, with forward slashes.

        Returns:
            The file, or None if the model has no such file.

        Raises:
            InputError: If the hub cannot be reached, does not know the model or does not give it.
        """
        if self.folder is not None:
            file = self.folder / path
            return file if file.is_file() else None
        if path not in self._found:
            self._found[path] = self._download(path)
        return self._found[path]

    def _download(self, path: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub import utils as errors  # their place before 0.25, and since

        assert self.repository is not None
        options = dict(self._options)
        if self._offline:
            # The client tries for many seconds to reach a hub that is down.
            options['local_files_only'] = True
        try:
            return Path(str(hf_hub_download(self.repository, path, revision=self.revision, **options)))
        except errors.LocalEntryNotFoundError as error:
            self._check_token(error.__cause__)
            # Without the network a file that the model never had and one that was never fetched look alike. Of a
            # revision that is in the cache the first is meant; whoever needs the file says so, see `lacks`.
            self._offline = self._offline or one_line(error.__cause__ or error)
            if self._cached():
                return None
            raise self._refused(self._not_cached()) from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise self._refused(
                f'it is gated: accept its licence at https://huggingface.co/{self.repository}, then log in with '
                '`hf auth login` or set HF_TOKEN'
            ) from error
        except errors.RevisionNotFoundError as error:
            raise self._refused(f'it has no revision {self.revision or "main"!r}') from error
        except errors.RepositoryNotFoundError as error:
            raise self._refused(
                f'there is no model {self.repository!r}, or it is private: check the name; for a private one log in '
                'with `hf auth login` or set HF_TOKEN'
            ) from error
        except Exception as error:  # the hub's client raises from several libraries below it
            self._check_token(error)
            raise self._refused(one_line(error)) from error

    def _check_token(self, error: BaseException | None) -> None:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        if status in (401, 403):
            raise self._refused(
                f'the token was refused ({status}): log in with `hf auth login`, or set another HF_TOKEN'
            ) from error

    def _cache(self) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        assert self.repository is not None
        cache = Path(self._options['cache_dir'] or constants.HF_HUB_CACHE)
        return cache / repo_folder_name(repo_id=self.repository, repo_type='model')

    def _cached(self) -> list[str]:
        """Files of the asked revision that the cache has."""
        name = self.revision or 'main'
        reference = self._cache() / 'refs' / name
        commit = reference.read_text().strip() if reference.is_file() else name
        snapshot = self._cache() / 'snapshots' / commit
        return sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob('*') if file.is_file())

    def _not_cached(self) -> str:
        references = self._cache() / 'refs'
        there = sorted(file.relative_to(references).as_posix() for file in references.rglob('*') if file.is_file())
        if not there:
            return f'{self._cache().parent} has nothing of it, and the hub was not reached ({self._offline})'
        return (
            f'the cache has no revision {self.revision or "main"!r} of it but {", ".join(there)}, and the hub was not '
            f'reached ({self._offline})'
        )

    def _refused(self, reason: str) -> InputError:
        return InputError(f'{self.field}={self.name!r} is neither a folder here nor to be had from the hub: {reason}')

    def lacks(self, what: str, hint: str = '') -> InputError:
        """Makes the error for a file that is needed and not there.

        Args:
            what: The file, or several.
            hint: What would help.
        """
        where = ''
        if self._offline:
            files = self._cached()
            shown = f'{", ".join(files[:6])}{", ..." if len(files) > 6 else ""}'
            where = f' in the cache, which has {shown}; the hub was not reached ({self._offline})'
        return InputError(f'{self.field}={self.name!r} has no {what}{where}{hint}')

    def read_json(self, path: str) -> dict[str, Any] | None:
        """Reads a JSON file of the model; None if there is none.

        Raises:
            InputError: If the file does not hold a JSON object.
        """
        file = self.find(path)
        if file is None:
            return None
        try:
            content = json.loads(file.read_text(encoding='utf-8'))
        except (ValueError, RecursionError) as error:
            raise InputError(f'{file} is not valid JSON: {error}') from error
        if not isinstance(content, dict):
            raise InputError(f'{file} holds a {type(content).__name__}; a JSON object is expected')
        return content

    def weights(self, folder: str, variant: str | None = None) -> dict[str | None, str]:
        """Finds the files of the weights in a folder: safetensors before ``.bin``, sharded or not.

        Args:
            folder: Inside the model folder; empty for the folder itself.
            variant: As diffusers' argument: ``'fp16'`` reads ``diffusion_pytorch_model.fp16.safetensors``. Where there
                is none of it, the plain file.

        Returns:
            File of each tensor; a single entry with key None for an unsharded model.

        Raises:
            InputError: If there are none.
        """
        prefix = f'{folder}/' if folder else ''
        for middle in dict.fromkeys((f'.{variant}' if variant else '', '')):
            for suffix in SUFFIXES[:2]:
                index = self.read_json(f'{prefix}{WEIGHTS}{suffix}.index{middle}.json')
                single = f'{prefix}{WEIGHTS}{middle}{suffix}'
                if index is None and self.find(single) is None:
                    continue
                if variant and not middle:
                    logger.warning(
                        '%s=%r has no variant %r in %s: the plain file is read', self.field, self.name, variant, folder
                    )
                return {None: single} if index is None else self._read_index(index, folder, suffix)
        raise self.lacks(f'{prefix}{WEIGHTS}.safetensors or .bin')

    def _read_index(self, index: dict[str, Any], folder: str, suffix: str) -> dict[str | None, str]:
        shards = index.get('weight_map')
        if not isinstance(shards, dict) or not shards:
            raise InputError(f'{self.field}={self.name!r}: the index of {folder} has no weight_map')
        for shard in set(shards.values()):
            if not isinstance(shard, str) or not re.fullmatch(rf'[\w.-]+{re.escape(suffix)}', shard):
                raise InputError(f'{self.field}={self.name!r}: shard {shard!r} is not the name of a {suffix[1:]} file')
        return {key: f'{folder}/{shard}' if folder else shard for key, shard in shards.items()}

    def locate(self, folders: Sequence[str]) -> tuple[str, str, dict[str, Any]] | None:
        """Finds the network: in one of the usual folders of a pipeline, or alone.

        Args:
            folders: Of networks: ``'transformer'``, ``'unet'``.

        Returns:
            Its folder, that of the pipeline around it, and its ``config.json``; None if there is none.
        """
        around = self.subfolder.rpartition('/')[0]
        for path, pipeline in [*((self.join(one), self.subfolder) for one in folders), (self.subfolder, around)]:
            config = self.read_json(f'{path}/config.json' if path else 'config.json')
            if config is not None:
                return path, pipeline, config
        return None

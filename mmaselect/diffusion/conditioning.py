"""The constant prompt of text-conditional models: embedded once by ``tools/encode_prompt.py``, kept in a small file."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from pathlib import Path

import torch
from torch import Tensor

from mmaselect.diffusion.loading import Source
from mmaselect.errors import InputError
from mmaselect.files import atomic_path

PROMPT_FILE = 'prompt_embeds.safetensors'
#: What a prompt's embedding may consist of, and its dimensions: tokens (1, L, C), a vector (1, P), tokens of another
#: text encoder, and which tokens of both are no padding (1, L + M).
KEYS = {'prompt_embeds': 3, 'pooled_prompt_embeds': 2, 'prompt_embeds_2': 3, 'prompt_mask': 2}

logger = logging.getLogger('mmaselect')


def default_prompt_file(source: Source, prompt: str = '') -> Path:
    """Where the embedding of a prompt is kept unless the user says otherwise.

    Args:
        source: The model.
        prompt: The text.

    Returns:
        ``prompt_embeds.safetensors`` for the empty prompt, else a name with the first 12 digits of the text's SHA-256;
        in the model's own folder, beside a single file under the file's name, or, for a model on the hub, in
        ``$MMASELECT_CACHE`` (``~/.cache/mmaselect``) under its id and revision.
    """
    name = PROMPT_FILE
    if prompt:
        name = f'prompt_embeds-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}.safetensors'
    if source.single:
        name = f'{Path(source.single).stem}.{name}'
    if source.repository is None:
        assert source.folder is not None
        return source.folder / source.subfolder / name
    cache = Path(os.environ.get('MMASELECT_CACHE', Path.home() / '.cache' / 'mmaselect'))
    return cache / source.repository / (source.revision or '') / source.subfolder / name


def save_prompt(path: str | Path, embeds: dict[str, Tensor], prompt: str, model: str) -> None:
    """Writes the embedding of a prompt.

    Args:
        path: A ``.safetensors`` file, written atomically.
        embeds: Of ``KEYS`` those that the model reads.
        prompt: The text, kept in the file's metadata.
        model: The model whose text encoders were used, kept likewise.
    """
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(
            {key: embeds[key].contiguous().cpu() for key in KEYS if key in embeds},
            str(temporary),
            metadata={'prompt': prompt, 'model': model},
        )


def read_prompt(path: str | Path, expected: str | None = None) -> dict[str, Tensor]:
    """Reads what :func:`save_prompt` wrote.

    Args:
        path: The file.
        expected: The text that it must be the embedding of; None for any.

    Returns:
        Of ``KEYS`` those that it holds.

    Raises:
        InputError: If the file is unreadable or holds something else.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework='pt') as file:
            there = set(file.keys())
            embeds = {key: file.get_tensor(key) for key in KEYS if key in there or key == 'prompt_embeds'}
            text = (file.metadata() or {}).get('prompt')
    except Exception as error:
        raise InputError(f'prompt={str(path)!r} is not a file made by tools/encode_prompt.py: {error}') from error
    if any(value.dim() != KEYS[key] or len(value) != 1 for key, value in embeds.items()):
        shapes = {key: tuple(value.shape) for key, value in embeds.items()}
        raise InputError(f'prompt={str(path)!r} holds {shapes}; expected (1, L, C) and (1, P)')
    if expected is not None and text != expected:
        raise InputError(f'{path} holds the embedding of {text!r}, not of prompt={expected!r}: write it again')
    logger.info('constant prompt: %r, from %s', text, path)
    return embeds


def zero_prompt(widths: dict[str, int], tokens: int) -> dict[str, Tensor]:
    """Zeros in place of a prompt, for those who do not have its embedding. Not what the model was trained with."""
    return {key: torch.zeros(*((1, tokens) if KEYS[key] == 3 else (1,)), width) for key, width in widths.items()}


def load_prompt(prompt: str | None, source: Source | None, widths: dict[str, int], tokens: int) -> dict[str, Tensor]:
    """Finds the embedding of the constant prompt.

    Args:
        prompt: The text, whose embedding ``tools/encode_prompt.py`` has put into :func:`default_prompt_file`; or a
            ``.safetensors`` file that it made; or ``'zeros'``. None is the empty text.
        source: The model's folder; None for a model with random weights, which knows no prompt and gets zeros.
        widths: What the model reads, and how wide each is.
        tokens: Of the text encoders, for zeros.

    Returns:
        A tensor for each of ``widths``.

    Raises:
        InputError: If there is no such file, or it was made for another text or model.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"prompt={prompt!r} is not valid: give a text, a .safetensors file or 'zeros'")
    if prompt == 'zeros' or (prompt is None and source is None):
        logger.info('constant prompt: zeros (no text encoder has seen them; see tools/encode_prompt.py)')
        return zero_prompt(widths, tokens)
    if prompt and prompt.endswith('.safetensors'):
        if not Path(prompt).is_file():
            raise InputError(f"prompt={prompt!r} is not a file (make one with tools/encode_prompt.py, or set 'zeros')")
        return _check(read_prompt(prompt), prompt, widths)
    if source is None:
        raise InputError(f'prompt={prompt!r}: a model with random weights knows no text; leave it out')
    text = prompt or ''
    file = default_prompt_file(source, text)
    if not file.is_file():
        asked = f' --revision {source.revision}' if source.revision else ''
        asked += f' --prompt {shlex.quote(text)}' if text else ''
        # A single file has no text encoders that transformers could load.
        model = f'DIFFUSERS_FOLDER {file}' if source.single else source.repository or source.name
        raise InputError(
            f'prompt={prompt!r}: {source.name!r} has no {file}; write it with '
            f"`python tools/encode_prompt.py {model}{asked}`, give another file, or set prompt='zeros'"
        )
    return _check(read_prompt(file, text), str(file), widths)


def _check(embeds: dict[str, Tensor], file: str, widths: dict[str, int]) -> dict[str, Tensor]:
    missing = [name for name in widths if name not in embeds]
    if missing:
        raise InputError(f'{file} has no {missing[0]}, which this model reads: it was made for another family')
    return {name: embeds[name] for name in widths}

"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """Input from the user that cannot be used.

    Its message is one line that names the field, the value and what would be valid; the command line tools print
    that line and exit with a non-zero status instead of showing a traceback.

    Args:
        message: The line.
    """

    def __init__(self, message: str) -> None:
        # A data loader makes the error of its worker anew, with the worker's traceback before the line.
        name = type(self).__name__
        if message.startswith(f'Caught {name} in '):
            message = message.rpartition(f'{name}: ')[2].strip()
        super().__init__(message)


class NotFinite(InputError):
    """Features that hold NaN or infinity.

    Args:
        message: Where it was found, and why that may be.
        images: Places of the images in the batch that did it, counted from 0; none where all of several did, which is
            no fault of an image.
    """

    def __init__(self, message: str, images: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.images = list(images)


@contextmanager
def naming(name: Callable[[Any], str], batch: Sequence[Any]) -> Iterator[None]:
    """A block in which an image of :class:`NotFinite` gets its name.

    Args:
        name: Name of an image.
        batch: What ``name`` takes, for each image of the batch, which may hold all of them several times over.

    Raises:
        InputError: In place of :class:`NotFinite`.
    """
    try:
        yield
    except NotFinite as error:
        if not error.images:
            raise
        raise InputError(f'{name(batch[error.images[0] % len(batch)])}: {error}') from error


def one_line(error: BaseException, without: str = '') -> str:
    """What an error of another library says, in one line of at most 200 characters; its type if it says nothing.

    Args:
        error: The error.
        without: How its message may begin, to be left out.
    """
    return ' '.join(str(error).removeprefix(without).split())[:200] or type(error).__name__


def unknown(field: str, value: object, known: Iterable[object]) -> InputError:
    """Builds the error for a name that is not in a closed list.

    Args:
        field: Name of the config field or argument.
        value: What was given.
        known: Every value that would have been accepted.

    Returns:
        The error, to be raised by the caller.
    """
    return InputError(f'{field}={value!r} is not known; choose from: {", ".join(str(name) for name in known)}')


def check_timestep(value: object, field: str = 'timestep') -> float:
    """Validates a timestep on diffusers' 0-1000 scale.

    Args:
        value: Number to check.
        field: Name of the config field, for the message.

    Returns:
        The timestep as a float in [0, 1000].

    Raises:
        InputError: If it is not a number, or lies outside 0-1000.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1000:
        raise InputError(f'{field}={value!r} is not a timestep: give a number from 0 (clean) to 1000 (pure noise)')
    return float(value)


def check_timesteps(value: object, field: str = 'timestep') -> tuple[float, ...]:
    """Validates one timestep or several, see :func:`check_timestep`.

    Raises:
        InputError: If one of them is not valid, or there are none, or one comes twice.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    timesteps = tuple(check_timestep(one, field) for one in values)
    if not timesteps or len(set(timesteps)) < len(timesteps):
        raise InputError(f'{field}={values!r} is not valid: give at least one timestep, and each once')
    return timesteps


def check_choice(value: object, field: str, known: Iterable[object]) -> Any:
    """Validates one of a closed list, see :func:`unknown`; what cannot be hashed is none of them."""
    known = list(known)
    if not any(type(value) is type(one) and value == one for one in known):
        raise unknown(field, value, known)
    return value


def check_count(value: object, field: str, least: int = 1) -> int:
    """Validates a whole number.

    Raises:
        InputError: If it is something else, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f'{field}={value!r} is not valid: give a whole number of at least {least}')
    return value


def check_number(
    value: object, field: str, low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False
) -> float:
    """Validates a finite number of an interval.

    Args:
        value: Number to check.
        field: Name of the config field, for the message.
        low: Least value.
        high: Greatest value.
        open_low: Whether ``low`` itself is out of it.
        open_high: Whether ``high`` itself is.

    Raises:
        InputError: If it is something else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        inside = low <= value <= high
        if inside and not (open_low and value == low) and not (open_high and value == high):
            return value
    above = f'above {low:g}' if open_low else f'of at least {low:g}'
    upto = '' if high == math.inf else f' and {"below" if open_high else "at most"} {high:g}'
    raise InputError(f'{field}={value!r} is not valid: give a number {above}{upto}')


def check_flag(value: object, field: str) -> bool:
    """Validates True or False.

    Raises:
        InputError: If it is something else, a text or a number among it.
    """
    if not isinstance(value, bool):
        raise InputError(f'{field}={value!r} is not valid: give True or False')
    return value


def check_fields(config: object, field: str, known: Iterable[str], example: str) -> dict[str, Any]:
    """Validates that a config entry is a dict of known fields.

    Args:
        config: The entry.
        field: Its name.
        known: Names that it may have.
        example: What would be valid, for the message.

    Returns:
        The entry.

    Raises:
        InputError: If it is no dict, or has another field.
    """
    if not isinstance(config, dict):
        raise InputError(f'{field}={config!r} is not valid: give {example}')
    known = list(known)
    for key in config:
        if key not in known:
            raise unknown(f'field of {field}', key, known)
    return config

"""The one exception that means "the input is wrong", as opposed to "the code is wrong"."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Input from the user that cannot be used.

    Its message is one line that names the field, the value and what would be valid; the command line tools print
    that line and exit with a non-zero status instead of showing a traceback.
    """


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

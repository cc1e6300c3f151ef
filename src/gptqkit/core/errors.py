"""The error tree. Every failure that a user can cause is one of these, and each maps to one exit code of the command line.

    GptqkitError
    ├── CheckFailed      exit 1   a check that was asked for did not hold (verify, eval --max-kl, --strict)
    ├── InputError       exit 2   bad input or usage: a wrong flag, a broken file, a model that cannot be handled
    └── ResourceError    exit 3   out of memory or disk, or a folder that stopped being writable during the run

A message says the value received, the values allowed, the cause and the remedy, and the remedy is something that can be typed.
"""

from __future__ import annotations


class GptqkitError(Exception):
    """Base of all errors that are raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class CheckFailed(GptqkitError):
    """A check that the user asked for did not hold."""

    exit_code = 1


class InputError(GptqkitError, ValueError):
    """The input cannot be used as it is; nothing was written."""

    exit_code = 2


class ResourceError(GptqkitError):
    """Memory or disk ran out. Finished work is kept and can be resumed."""

    exit_code = 3

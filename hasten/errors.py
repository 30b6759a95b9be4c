"""The one kind of error that a user is meant to read."""

from __future__ import annotations


class HastenError(Exception):
    """A mistake in what was given, said in one line.

    The message says what was given, what is allowed and what to do about it. The command line
    prints it without a traceback and exits with code 2.
    """


class PlanError(HastenError):
    """A plan that cannot be parsed, ordered or applied."""


class SubjectError(HastenError):
    """A model that cannot be opened, or that an engine or a technique cannot run."""

"""Errors that a user can act on: one sentence each, with the fix in it."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; the message says how."""


class DiskFullError(UserError):
    """The disk filled up while a file was written; what was there before is untouched."""


class MissingExtraError(UserError):
    """A package of an extra is not installed; the message holds the pip command."""

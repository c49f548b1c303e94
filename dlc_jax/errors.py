"""The errors that a person can cause: one line that says what is wrong, where, and what to do."""


class UserError(Exception):
    """A mistake in a command, a config, a path or a file; its text is the whole message, one line.

    `main` prints it and exits with 2.
    """


class Interrupted(Exception):
    """The run was asked to stop; everything is saved and the same command goes on.

    `main` exits with 75.
    """

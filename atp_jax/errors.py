"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A bad setting, file or row. The command line prints it as one line and exits with status 2.

    The message says what is wrong, where (file, line, row, key), and what to do.
    """

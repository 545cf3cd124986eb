"""The one exception for mistakes that a user can make and mend."""


class UserError(Exception):
    """A wrong input: `<file or key>: what is wrong; remedy`, one line per mistake.

    The command line prints it without a traceback and exits with 2. Everything else that is raised is a bug.
    """

"""The errors that users see.

Everything a user can cause (a wrong value, a broken file, a full disk) is raised as a `FedSimError` whose text
names the file, line or field and says how to mend it. The command line prints the text alone and exits with 2.
Broken invariants of our own stay `AssertionError`s and keep their traceback.
"""


class FedSimError(Exception):
    """A problem that the user can mend; its text is one clear message."""


class ConfigError(FedSimError):
    """A config key or value that is not accepted; names the field, the value and the rule."""


class DataError(FedSimError):
    """A data file that cannot be used; names the file and, where there is one, the line."""


class RunError(FedSimError):
    """A run folder, checkpoint or cluster that cannot be used, or a client that failed."""


class LostActorError(RunError):
    """An actor is gone with what it held; from the last checkpoint on, its work can be repeated."""

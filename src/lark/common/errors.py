"""The error that is for users."""


class LarkError(ValueError):
    """A user's mistake, or a limit he can do something about: setting or place, value, what is wrong, remedy.

    Commands print it as one sentence and exit with 1. Any other exception is a defect and shows its traceback.
    """

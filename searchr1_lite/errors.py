"""The one error that a command catches: something that the user can put right. Everything else is a fault of ours."""


class UserError(ValueError):
    """What is wrong, where, and what to do; printed without a traceback by `searchr1_lite/cli.py`.

    A ValueError, since pydantic takes no other from a validator.
    """

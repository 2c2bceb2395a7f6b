"""The one exception a user of ``eua`` has to know."""


class EUAError(ValueError):
    """Something passed to ``eua`` cannot work. The text says what was passed, why it cannot work, and what to do."""

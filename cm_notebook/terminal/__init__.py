"""What a person in a terminal types and sees; ``cli.py`` is the way in."""

DONE, FAILED, USAGE, WAITING, STOPPED, DECIDED, NOTHING, NOT_FOUND, LOCKED = range(9)
"""Exit codes."""

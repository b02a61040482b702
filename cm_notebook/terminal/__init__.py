"""What a person in a terminal types and sees; ``cli.py`` is the way in."""

DONE, FAILED, USAGE, WAITING, STOPPED = range(5)
"""Exit codes."""

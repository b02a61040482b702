"""What the events mean, by theme; ``state.py`` puts it together and lists the themes.

Dependencies point one way, in the order of that list; what is private to a theme begins with ``_``.
"""

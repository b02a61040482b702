"""Engines: who does the work. ``base`` is the seam, the other modules are its sides."""

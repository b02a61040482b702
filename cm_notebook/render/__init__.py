"""Representations of runs and of what agents wrote: pure functions from data to text, HTML or SVG, without I/O.

Import the module you need (``render.markdown``, ``render.diff``, …): nothing is loaded from here, so that
``import cm_notebook`` stays quick.
"""

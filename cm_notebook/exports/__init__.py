"""Workflows and runs as files that others can read, run and keep under version control."""

from .files import export_run, export_workflow, is_program

__all__ = ["export_run", "export_workflow", "is_program"]

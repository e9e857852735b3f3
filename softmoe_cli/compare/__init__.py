"""Compares finished runs: groups, intervals, verdicts, tables, figures, a page."""

"""Finished runs against each other: groups, intervals, verdicts, tables, figures, a page."""

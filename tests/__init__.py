"""Tests mirror the package: test_<module>.py."""

import gc

gc.set_threshold(50_000)  # as the command line: to look after 700 new objects took 6 of the 22 s of collecting tests

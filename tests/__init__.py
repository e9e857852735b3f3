"""Tests mirror the package: test_<module>.py."""

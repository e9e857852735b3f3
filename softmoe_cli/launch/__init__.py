"""Runs the jobs of a sweep, on this machine or a cluster, and the processes of one run."""

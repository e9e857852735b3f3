"""Where jobs run: a sweep's, on this machine or a cluster; and the processes of one run."""

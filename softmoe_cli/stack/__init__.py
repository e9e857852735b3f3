"""Several seeds of one model as one computation: each is a run of its own, and only their passes are one."""

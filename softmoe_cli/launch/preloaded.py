"""What jobs find imported: the server that they are forked from imports this module. Packages are deferred there as in
every command."""

from importlib import import_module

from softmoe_cli.deferred import defer_packages

defer_packages()
for name in ("softmoe_cli.train.loop", "torch._dynamo"):  # the latter is what every optimizer imports
    import_module(name)

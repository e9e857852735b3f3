"""What jobs find imported: the server that they are forked from imports this module."""

from importlib import import_module

from softmoe_cli.process import settle_in, settled

settle_in()
for name in ("softmoe_cli.train.loop", "torch._dynamo"):  # the latter is what every optimizer imports
    import_module(name)
settled()

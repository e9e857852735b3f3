"""`python -m softmoe_cli` is `softmoe`."""

from softmoe_cli.cli import main

main()

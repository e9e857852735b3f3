"""`python -m softmoe_cli` runs `softmoe`, without importing modules from the working folder."""

import sys
from pathlib import Path

if Path(sys.path[0]) == Path.cwd() != Path(__file__).resolve().parents[1]:
    del sys.path[0]  # python -m puts the working folder there, with every hydra_plugins/ and yaml.py in it

from softmoe_cli.cli import main

main()

"""`python -m softmoe_cli` is `softmoe`: what lies in the working folder is not imported for it."""

import sys
from pathlib import Path

if Path(sys.path[0]) == Path.cwd() != Path(__file__).resolve().parents[1]:
    del sys.path[0]  # python -m puts it there, and with it every hydra_plugins/ and yaml.py of a downloaded folder

from softmoe_cli.cli import main

main()

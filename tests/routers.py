"""The routers that are shipped, by their files."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
YAMLS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf/model/router").glob("*.yaml"))}
ROUTERS = {name: options for name, options in YAMLS.items() if options["_target_"] is not None}

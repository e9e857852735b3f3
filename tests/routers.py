"""The options of every router that is shipped, from its yaml."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
YAMLS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf/model/router").glob("*.yaml"))}
ROUTERS = {
    name: options | ({"num_tasks": 1} if "num_tasks" in options else {})
    for name, options in YAMLS.items()
    if options["_target_"] is not None
}
"""The options of every router; of those that decide for tasks with one, which needs no name."""


def start(router: str) -> str:
    """What makes its experts start different: those that are linear maps do so anyhow."""
    return f"model.expert_init={'identical' if router.startswith('mumoe_') else 'independent'}"

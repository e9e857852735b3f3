"""A conf folder of the user's in the working directory: what Hydra takes from it, and what not.

It adds and replaces models, data sets, recipes, experiments and searches. A folder that was downloaded may have one
too: Hydra's own node (callbacks, launchers, sweepers) can name any code, and the configurations of the commands
themselves could bring one, so that neither is taken from there.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin

from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.options.conf_files import load_yaml

OWN_GROUPS = ("model", "data", "recipe", "experiment", "search")
GLOBAL_GROUPS = OWN_GROUPS[2:]
"""Groups whose files may speak of all options: `# @package _global_`."""
LAUNCHER = ("objective", "limit")
SWEEPER = ("params", "direction", "n_trials", "n_jobs", "max_failure_rate", "sampler")
CHOICES = re.compile(r"override /hydra/sweeper(/sampler)?")
"""What an experiment or a search may say of Hydra: what is tried, and how it is searched, by installed sweepers."""


def ignored(own: Path, command: str) -> str | None:
    """A sentence that names a file of the user's conf folder that is not read; None where there is none."""
    unread = [path for path in (own / f"{command}.yaml", own / "run.yaml", own / "hydra") if path.exists()]
    if not unread:
        return None
    groups = f"{', '.join(OWN_GROUPS[:-1])} and {OWN_GROUPS[-1]}"
    return f"{unread[0]} is not read: a conf folder of your own adds {groups} only"


class OwnConf(SearchPathPlugin):
    """The user's conf folder comes first, so that it can add and replace."""

    own: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.own is not None and self.own.parent == Path.cwd():
            search_path.prepend("softmoe-own", f"{OwnSource.scheme()}://{self.own}")


class OwnSource(FileConfigSource):
    """Files of the user's conf folder, below the groups that may be there."""

    @staticmethod
    def scheme() -> str:
        return "softmoe-own"

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        tree = load_yaml(path)
        try:
            result = super().load_config(config_path)
        except ValueError as error:
            raise UsageError(f"{path} cannot be read: {first_line(error)}") from error
        fault = _fault(tree, config_path.split("/")[0], result.header["package"])
        if fault is not None:
            raise UsageError(f"{path}: {fault}")
        return result

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return _allowed(config_path) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        return "/" in config_path and _allowed(config_path) and super().is_config(config_path)


def _allowed(config_path: str) -> bool:
    """Whether a path stays below one of the groups; a folder called hydra would become Hydra's node."""
    first, *others = re.split(r"[/.]", config_path.removesuffix(".yaml"))
    return first in OWN_GROUPS and not {"hydra", ""} & set(others)


def _fault(tree: dict[str, Any], group: str, package: str | None) -> str | None:
    """What is wrong with a file of the user's conf folder: it says what only ours may say. None: nothing is."""
    where = "type it, as in softmoe train -m hydra/launcher=slurm"
    if package is not None and (package != "_global_" or group not in GLOBAL_GROUPS):
        return f"# @package {package} has no place here; leave it out"
    for entry in tree.get("defaults") or []:
        for said in map(str, entry if isinstance(entry, dict) else [entry]):
            if "hydra" in said and not (CHOICES.fullmatch(said) and group in GLOBAL_GROUPS):
                return f"its defaults choose {said}, which is Hydra's own; {where}"
    if "hydra" not in tree:
        return None
    node = tree["hydra"]
    if group not in GLOBAL_GROUPS or not isinstance(node, dict) or not node.keys() <= {"launcher", "sweeper"}:
        return f"it speaks of hydra, which a conf folder of your own may not; {where}"
    for key, known in {"launcher": LAUNCHER, "sweeper": SWEEPER}.items():
        options = node.get(key) or {}
        other = next(iter(options.keys() - set(known)), None) if isinstance(options, dict) else ""
        if other is not None:
            return f"it speaks of hydra.{key}{f'.{other}' if other else ''}, which a conf folder may not; {where}"
    params = (node.get("sweeper") or {}).get("params") or {}
    if not isinstance(params, dict) or any("hydra" in str(name) for name in params):
        return f"hydra.sweeper.params may name options of softmoe only; {where}"
    odd = next((value for value in _leaves(node) if "${" in str(value)), None)
    if odd is not None or _targets(node):
        return f"its hydra node may hold plain values only, not {odd or '_target_'}; {where}"
    return None


def _leaves(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in _leaves(value)]
    return [leaf for value in node for leaf in _leaves(value)] if isinstance(node, list) else [node]


def _targets(node: Any) -> bool:
    """Whether a key anywhere asks Hydra to call something."""
    if isinstance(node, dict):
        return any(str(key).startswith("_") or _targets(value) for key, value in node.items())
    return isinstance(node, list) and any(_targets(value) for value in node)

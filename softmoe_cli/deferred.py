"""Packages whose __init__ runs when something of it is asked for, and not before.

To import `timm.layers` is to import `timm` first, and with it every family of models that timm has; and of torchvision
one class is enough to import its detectors, and behind them torch's compiler. A command uses one family and no
detector. scipy asks numpy for all that it has, and so for its Fortran compiler; timm prepares to talk to the Hugging
Face hub. Here a package is there at once, its submodules can be imported, and the first name that it lacks runs its
__init__, after that of the package around it: from then on it is the package that everybody knows. Nothing of it is
left out or replaced, so that code of one's own sees no difference.
"""

import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # to import those classes is to import temporary files, random numbers and more; Python asks for their methods
    Loader = MetaPathFinder = object

PACKAGES: Mapping[str, Mapping[str, str]] = {
    "httpcore2": {},
    "numpy.f2py": {},
    "timm": {"__version__": "version"},
    "timm.data": dict.fromkeys(
        (
            f"{of}_{kind}"
            for of in ("IMAGENET_DEFAULT", "IMAGENET_INCEPTION", "OPENAI_CLIP")
            for kind in ("MEAN", "STD")
        ),
        "constants",
    ),
    "timm.models": {},
    "timm.utils": {},
    "torchvision": {"models": "models", "ops": "ops"},
    "torchvision.models": {},
    "torchvision.ops": {},
}
"""Packages with a costly __init__ of which commands need single submodules, and names that such a submodule asks of
them: each is taken from the submodule that the __init__ would take it from, or is that submodule."""


def defer_packages() -> None:
    """Defers them in this process, as far as they are not imported yet. For a command's own process only: a program
    that imports softmoe_cli decides this itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PACKAGES or target is not None:  # a target is a module that is to be loaded again
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, whole: Loader) -> None:
        self.whole = whole

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet: the module has its name and its path, and so its submodules can be found."""

    def __getattr__(self, name: str) -> Any:  # such as get_source, for whoever shows code
        return getattr(self.whole, name)


_lock = threading.RLock()  # other threads wait for the whole
_running: set[str] = set()


class _Package(ModuleType):
    """A package whose __init__ has not run to its end."""

    def __getattr__(self, name: str) -> Any:
        known = PACKAGES[self.__name__].get(name)
        if known is not None:
            found = import_module(f"{self.__name__}.{known}")
            value = found if known == name else vars(found).get(name)
            if value is not None:
                return value
        if (name.startswith("__") and name != "__all__") or not _run(self):  # __NAMES__ are asked of every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        _run(self)
        return [*vars(self)]


def _run(package: ModuleType) -> bool:
    """Runs what has not run yet; False where it is running, and asks for a name that it does not have yet."""
    with _lock:
        if not isinstance(package, _Package):
            return True
        if package.__name__ in _running:
            return False
        around = sys.modules.get(package.__name__.rpartition(".")[0])
        if around is not None:
            _run(around)
        spec = package.__spec__
        if not isinstance(package, _Package) or spec is None:  # the one around it has asked for it
            return True
        assert isinstance(spec.loader, _Loader)
        whole, before = spec.loader.whole, set(vars(package))
        _running.add(package.__name__)
        try:
            whole.exec_module(package)
        except BaseException:  # as if nothing had run; submodules have run to their ends
            for name in vars(package).keys() - before:
                if f"{package.__name__}.{name}" not in sys.modules:
                    delattr(package, name)
            raise
        finally:
            _running.remove(package.__name__)
        package.__loader__ = spec.loader = whole
        whole_package: ModuleType = package
        whole_package.__class__ = ModuleType
        return True

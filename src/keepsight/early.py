"""What has to be so before PEFT is imported, and what is done as soon as it has been.

PEFT costs seconds to import, so `import keepsight` leaves that to whoever needs it, and makes its methods known to PEFT
right after. PEFT imports bitsandbytes wherever that is installed, which warns on CPUs with AVX-512 that an optional
kernel of another package is missing; a command's error output is for what the user can act on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def after_import(names: tuple[str, ...], action: Callable[[], object]) -> None:
    """Call `action()` once, right after the first of some modules has been imported: now, if one has been.

    Where one of them imports another, `action` waits for the outer one, so that it may use both.

    Args:
        names: of the modules. The package of a module inside one must have been imported.
        action: called in the importing thread, before its `import` statement ends; what it raises ends that statement,
            and the next import calls it again. Not called when the import itself fails.
    """
    finder = _Finder(names, action)
    sys.meta_path.insert(0, finder)  # for good: a list that shrinks makes another thread's search skip an entry
    if any(name in sys.modules for name in names):
        finder.act()


class _Finder(MetaPathFinder):
    """Finds the modules as the other finders do, with a loader that calls `act` behind the original one."""

    def __init__(self, names: tuple[str, ...], action: Callable[[], object]):
        self.names, self.action = names, action
        self.running: set[str] = set()  # of all threads: another one's half module is not to be used either
        self.is_done = False

    def act(self) -> None:
        """Call the action, once."""
        if self.is_done:
            return
        self.is_done = True  # the action imports
        try:
            self.action()
        except BaseException:
            self.is_done = False
            raise

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, with our loader in it; None for all other modules."""
        if self.is_done or fullname not in self.names:
            return None
        for other in list(sys.meta_path):
            spec = None if isinstance(other, _Finder) else other.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:  # a folder without __init__.py has none
                    spec.loader = _Loader(self, spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads a module as the original loader does, then has the finder act."""

    def __init__(self, finder: _Finder, original: Loader):
        self.finder, self.original = finder, original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The original's."""
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, which sees its original loader, then act."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.original
        self.finder.running.add(module.__name__)
        try:
            self.original.exec_module(module)
        finally:
            self.finder.running.discard(module.__name__)
        if not self.finder.running:
            self.finder.act()

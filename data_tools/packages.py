"""Installed packages and the standard library as source code: where they lie, their version and licence.

Nothing is imported: finders and metadata only.
"""

import importlib.machinery
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import UserError

STDLIB = "stdlib"
# Large, well documented and common beside the training libraries; those that are installed are used.
HELD_OUT = ("networkx", "pandas", "scipy", "sklearn", "sympy", "matplotlib", "statsmodels", "xarray", "nltk")
# Folders of tests, of third-party copies and of programs that happen to live in the library.
_SKIPPED_FOLDERS = re.compile(
    r"__pycache__|(site|dist)-packages|_?test(s|ing)?|idlelib|lib2to3|turtledemo|ensurepip|pydoc_data"
    r"|_?vendor(ed)?|externals|extern|_external"
)


@dataclass(frozen=True)
class Package:
    """Where the source of a package lies, and what its metadata says."""

    name: str
    root: Path
    version: str
    license: str


def find_packages(names: Sequence[str]) -> list[Package]:
    """The packages of these import or distribution names; `stdlib` is the standard library.

    Raises UserError listing what is installed if one is not there.
    """
    owners = importlib.metadata.packages_distributions()
    imports = {owner.casefold(): name for name, all_owners in owners.items() for owner in all_owners}
    imports |= {name: name for name in owners}
    packages = []
    for asked in dict.fromkeys(names):
        if asked == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            packages.append(Package(STDLIB, root, platform.python_version(), "PSF-2.0"))
            continue
        name = imports.get(asked.casefold(), asked)
        spec = importlib.machinery.PathFinder.find_spec(name) if name in owners else None
        if spec is None or not spec.submodule_search_locations:
            installed = ", ".join(sorted({n for n in owners if n.isidentifier() and not n.startswith("_")}))
            raise UserError(f"package {asked!r} is no installed folder of Python files; allowed: {STDLIB}, {installed}")
        folder, distribution = Path(next(iter(spec.submodule_search_locations))), owners[name][0]
        packages.append(Package(name, folder, importlib.metadata.version(distribution), _license(distribution)))
    return packages


def _license(distribution: str) -> str:
    facts: Any = importlib.metadata.metadata(distribution)  # an email.message.Message
    stated = facts.get("License-Expression") or (facts.get("License") or "").strip().partition("\n")[0].strip()
    classifiers = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or () if c.startswith("License ::")]
    if stated and len(stated) < 80 and not stated.casefold().startswith("copyright"):
        return stated
    return "; ".join(classifiers) or "unknown"


def python_files(package: Package) -> list[Path]:
    """Its Python files in order, without tests and copies of other people's packages."""
    return sorted(
        path
        for path in package.root.rglob("*.py")
        if not any(map(_SKIPPED_FOLDERS.fullmatch, path.relative_to(package.root).parts[:-1]))
        and not path.name.startswith(("test_", "conftest"))
    )

"""Installed packages and the standard library as source code: where they lie, their version and licence.

Nothing is imported: finders and metadata only.
"""

import importlib.machinery
import importlib.metadata
import platform
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from launch.errors import UserError

PACKAGE = "package:"  # before the name of an installed package where a path stands
_STDLIB, _EVERYTHING = "stdlib", "site-packages"
# Folders of tests, of third-party copies and of programs that happen to live in the library.
_SKIPPED_FOLDERS = re.compile(
    r"__pycache__|(site|dist)-packages|_?test(s|ing)?|idlelib|lib2to3|turtledemo|ensurepip|pydoc_data"
    r"|_?vendor(ed)?|externals|extern|_external"
)


@dataclass(frozen=True)
class Package:
    """Where the source of a package lies, and what its metadata says."""

    root: Path
    version: str
    license: str


@cache  # it reads the metadata of all that is installed, and a source is looked up by several stages
def find_package(asked: str) -> Package:
    """The package of this import or distribution name; `stdlib` is the standard library, `site-packages` all that is
    installed, under the licences of each.

    Raises UserError listing what is installed if it is not there.
    """
    if asked == _STDLIB:
        return Package(Path(sysconfig.get_path("stdlib")), platform.python_version(), "PSF-2.0")
    if asked == _EVERYTHING:
        installed = {_license(str(d.metadata["Name"])) for d in importlib.metadata.distributions()} - {"unknown"}
        return Package(Path(sysconfig.get_path("purelib")), "", " AND ".join(f"({name})" for name in sorted(installed)))
    owners = importlib.metadata.packages_distributions()
    imports = {owner.casefold(): name for name, all_owners in owners.items() for owner in all_owners}
    name = asked if asked in owners else imports.get(asked.casefold(), asked)
    spec = importlib.machinery.PathFinder.find_spec(name) if name in owners else None
    if spec is None or not spec.submodule_search_locations:
        installed = ", ".join(sorted({n for n in owners if n.isidentifier() and not n.startswith("_")}))
        raise UserError(
            f"package {asked!r} is no installed folder of Python files; allowed: {_STDLIB}, {_EVERYTHING}, {installed}"
        )
    distribution = owners[name][0]
    folder = Path(next(iter(spec.submodule_search_locations)))
    return Package(folder, importlib.metadata.version(distribution), _license(distribution))


def _license(distribution: str) -> str:
    facts: Any = importlib.metadata.metadata(distribution)  # an email.message.Message
    stated = facts.get("License-Expression") or (facts.get("License") or "").strip().partition("\n")[0].strip()
    classifiers = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or () if c.startswith("License ::")]
    if stated and len(stated) < 80 and not stated.casefold().startswith("copyright"):
        return spdx_license(stated)
    return spdx_license("; ".join(classifiers))


def spdx_license(name: str | None) -> str:
    """The SPDX expression that `name` is in any case of letters, else LicenseRef-NAME; "unknown" for no name."""
    if not name or name == "unknown":
        return "unknown"
    try:
        return canonicalize_license_expression(name)
    except InvalidLicenseExpression:
        return "LicenseRef-" + re.sub("[^A-Za-z0-9.]+", "-", name)[:64].strip("-")


def python_files(root: Path) -> list[Path]:
    """The Python files below a folder in order, without empty ones, tests and copies of other people's packages."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if not any(map(_SKIPPED_FOLDERS.fullmatch, path.relative_to(root).parts[:-1]))
        and not path.name.startswith(("test_", "conftest"))
        and path.is_file()  # no folder, and no link to what is not there
        and path.stat().st_size
    )

"""A rename in one room breaks the tests of that room and no others: what each test file may name, read from its source.

Every file names the public names of the packages, what lies in `tests/helpers`, and modules of its own room. Names with
an underscore are nobody's, but for the few files that say why.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import tarflow_export
import tarflow_runtimes
import tarflow_sdk

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
PACKAGES = (tarflow_export, tarflow_runtimes, tarflow_sdk)
PUBLIC = {f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__} | {"tarflow_sdk.testing"}
NAME = re.compile(r"\btarflow_(?:export|runtimes|sdk)(?:\.\w*[a-z]\w*)+")

ROOMS = {
    "cli": "runtimes.cli",
    "export": "export",
    "gpu": "runtimes.engines.gpu",
    "helpers": "runtimes",
    "native": "runtimes.engines.native",
    "sdk": "sdk",
}
"""The room of a folder; that of `tests/runtimes/X` is `runtimes.X`."""

PRIVATE = {
    "export/conftest.py": "plants faults where the exporter plans and writes, which nothing given to it makes it do",
    "export/test_export_bundle.py": "stands in for a disk that cannot exchange folders and for models of gigabytes",
    "helpers/host_device.py": "opens the graphs of trt as OrtMaker opens its own, a session for each length",
    "native/conftest.py": "an inverse in float64 that guides each image and step differently, as a kernel is called",
    "sdk/test_data.py": "reads images and augments them: all that training has before a model",
    "sdk/test_laws.py": "the step of the inverse with its caches, against the whole sequence",
    "sdk/test_train.py": "single steps of training, and runs that are stopped at each of them",
}
"""The files that need a name with an underscore, and what for."""


def room(path: Path) -> str:
    """The module whose parts a test file may name; `tarflow_nothing` where there is none."""
    folder, *below = path.relative_to(TESTS).parts[:-1] or ("",)
    return "tarflow_" + (".".join((folder, *below)) if folder == "runtimes" and below else ROOMS.get(folder, "nothing"))


@functools.cache
def named(path: Path) -> frozenset[str]:
    """What of our packages a file imports or writes in a string: `package.module.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(NAME.findall(node.value))
    return frozenset(name for name in found if NAME.fullmatch(name))


def underscored(path: Path) -> Iterator[str]:
    """Private modules and members: an import of `_data`, `flow._engine`, `setattr(flow, "_engine", ...)`."""
    yield from (name for name in named(path) if "._" in name)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in {"self", "cls"}:
            names = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        else:
            continue
        yield from (name for name in names if name.startswith("_") and not name.endswith("_"))


def test_a_file_names_what_is_public_or_of_its_room() -> None:
    strange = {}
    for path in FILES:
        doors = (*PUBLIC, room(path))
        others = [name for name in sorted(named(path)) if "._" not in name]
        names = [name for name in others if not any(f"{name}.".startswith(f"{door}.") for door in doors)]
        strange |= {str(path.relative_to(TESTS)): names} if names else {}
    assert strange == {}


def test_few_files_need_private_names_and_say_why() -> None:
    found = {str(path.relative_to(TESTS)): sorted(set(underscored(path))) for path in FILES}
    assert {path: names for path, names in found.items() if names and path not in PRIVATE} == {}
    assert [path for path in PRIVATE if not found.get(path)] == [], "they need no private name any more"
    assert all(PRIVATE.values())
    assert len(PRIVATE) < 10

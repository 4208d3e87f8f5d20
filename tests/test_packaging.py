"""The layout holds: one namespace, dependencies one way, each package its own distribution."""

import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["attention", "quantizers", "data", "models", "inference", "eval", "train", "cli"]
LEAVES = ["attention", "quantizers", "data"]


def dependencies(folder: Path) -> dict[str, str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    parts = (re.match(r"([A-Za-z0-9_.-]+)(.*)", line) for line in project["dependencies"])
    return {match[1].lower(): match[2] for match in parts if match}


def test_the_root_depends_on_the_union_of_what_the_packages_declare():
    union: dict[str, str] = {}
    for package in PACKAGES:
        for name, bound in dependencies(ROOT / package).items():
            if name.startswith("elastictok-"):
                continue
            assert union.setdefault(name, bound) == bound, f"{package} bounds {name} differently"
    assert dependencies(ROOT) == union


def test_leaves_depend_on_no_other_package_and_data_on_no_accelerator_library():
    for leaf in LEAVES:
        assert not [n for n in dependencies(ROOT / leaf) if n.startswith("elastictok")]
    assert not {"jax", "equinox"} & set(dependencies(ROOT / "data"))
    for package in ["attention", "quantizers", "models"]:
        names = set(dependencies(ROOT / package))
        assert not {"optax", "orbax-checkpoint", "grain", "tyro"} & names


def test_versions_agree():
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for package in PACKAGES:
        project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
        assert project["version"] == root
        assert project["name"] == f"elastictok-{package}"
        for name, bound in dependencies(ROOT / package).items():
            if name.startswith("elastictok-"):
                assert bound == f"=={root}"


def test_the_namespace_has_no_init_and_every_package_is_typed_and_described():
    assert not list(ROOT.glob("*/elastictok/__init__.py"))
    for package in PACKAGES:
        assert (ROOT / package / "elastictok" / package / "py.typed").is_file()
        assert len((ROOT / package / "README.md").read_text().splitlines()) > 3


def test_every_package_is_in_every_list_of_packages():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    build = config["hatch"]["build"]
    assert set(build["dev-mode-dirs"]) == set(PACKAGES)
    assert set(build["targets"]["wheel"]["packages"]) == {f"{p}/elastictok" for p in PACKAGES}
    assert set(config["importlinter"]["root_packages"]) == {f"elastictok.{p}" for p in PACKAGES}
    assert set(config["pyright"]["include"]) == set(PACKAGES)


def test_dependencies_point_one_way():
    import importlinter  # noqa: F401  the test extra holds it

    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist_and_are_described(package):
    module = importlib.import_module(f"elastictok.{package}")
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"elastictok.{package}.{name} has no docstring"


SHAPES = """
import jax.numpy as jnp
from elastictok.models import Patching
Patching(1, 8, 8).patch({argument})
"""


@pytest.mark.parametrize(
    ("switch", "argument", "raises"),
    [
        ("1", "jnp.zeros((1, 8, 8, 3), jnp.int32)", True),
        ("1", "jnp.zeros((1, 8, 8, 3))", False),
        ("0", "jnp.zeros((1, 8, 8, 3), jnp.int32)", False),
    ],
)
def test_users_switch_on_run_time_types_with_an_environment_variable(switch, argument, raises):
    result = subprocess.run(
        [sys.executable, "-c", SHAPES.format(argument=argument)],
        env=os.environ | {"ELASTICTOK_TYPECHECK": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == raises, result.stderr
    if raises:
        assert "TypeCheckError" in result.stderr


def test_a_wrong_shape_raises_in_this_test_run():
    import jax.numpy as jnp
    from jaxtyping import TypeCheckError

    from elastictok.models import Patching

    with pytest.raises(TypeCheckError):
        Patching(1, 8, 8).patch(jnp.zeros((8, 8, 3)))

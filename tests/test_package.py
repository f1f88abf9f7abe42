"""The package in its three forms: a checkout, an editable install, a wheel.

`kernels` and `cache` are names of other people's packages; Transformers imports the first.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import pat_hf.kernels.ops, pat_hf.cache.pat_cache, pat_hf, transformers, kernels, sys
from pathlib import Path
home = Path({home!r})
for module in (pat_hf, pat_hf.kernels.ops, pat_hf.cache.pat_cache):
    assert Path(module.__file__).is_relative_to(home), module.__file__
assert kernels.__file__ and not Path(kernels.__file__).is_relative_to(home / "kernels"), kernels
assert "kernels.ops" not in sys.modules and "cache.pat_cache" not in sys.modules
assert "pat" in transformers.AttentionInterface()
"""


def run(code: str, cwd: Path, *path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, check=True)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    return next(folder.glob("*.whl"))


def test_wheel_installs_nothing_but_pat_hf(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pat_hf"}
    sources = {
        *("pat_hf/" + p.name for p in (ROOT / "pat_hf").iterdir() if p.suffix in (".py", ".typed")),
        *(f"pat_hf/{p.parent.name}/{p.name}" for p in (ROOT / "kernels").glob("*.py")),
        *(f"pat_hf/{p.parent.name}/{p.name}" for p in (ROOT / "cache").glob("*.py")),
    }
    assert sources <= set(names)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_wheel(wheel, where, tmp_path):
    home = tmp_path / "installed"
    pip("install", "--no-deps", "--target", str(home), str(wheel))
    run(CHECK.format(home=str(home)), tmp_path if where == "elsewhere" else home, home)


def test_checkout_without_installation(tmp_path):
    run(CHECK.format(home=str(ROOT)), tmp_path, ROOT)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_editable_installation(where, tmp_path):
    home = tmp_path / "editable"
    pip("install", "--no-deps", "--target", str(home), "--editable", str(ROOT))
    # A target folder's .pth files are not read by themselves.
    code = f"import site; site.addsitedir({str(home)!r})\n" + CHECK.format(home=str(ROOT))
    run(code, ROOT if where == "root" else tmp_path)

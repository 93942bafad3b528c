"""What the README promises of the files: an order of imports, and a size to hold in mind."""

import ast
import re
import shutil
import subprocess
import symtable

import pytest
from helpers import ROOT, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The files in the order of the README, which is that in which they build on each other.
MODULES = re.findall(r"^\| `(\w+)\.py` \|", README, re.M)
SOURCES = [path for folder in (".", "tests", "benchmarks") for path in (ROOT / folder).glob("*.py")]


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def test_the_readme_names_every_file_and_stays_short():
    assert sorted(MODULES) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert len(README.splitlines()) <= 250
    assert len(README.encode("utf-8")) <= 13 * 1024


def test_nothing_else_is_kept_at_the_top_level():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listing = ["git", "ls-files", "--", ":(glob)*"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    others = {".gitignore", "README.md", "pyproject.toml", "requirements.txt"}
    assert set(files.splitlines()) == others | {f"{name}.py" for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_what_stands_above_it(name):
    imported = {
        module.partition(".")[0]
        for node in ast.walk(tree(name))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported & set(MODULES) <= set(MODULES[: MODULES.index(name)])


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 550
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            longest = 110 if "argparse.ArgumentParser" in ast.unparse(node) else 70
            assert node.end_lineno - node.lineno < longest, node.name
    tables = [symtable.symtable(text, path.name, "exec")]
    for table in tables:
        tables += table.get_children()
        if table.get_type() == "function":
            assert len(table.get_locals()) <= 20, table.get_name()


@pytest.mark.parametrize(
    "script", ["gen_image", "dataset", "train", "demo", "model", "infer_tool export", "label"]
)
def test_help_shows_the_examples_and_explains_every_flag(script, tmp_path):
    name, *command = script.split()
    lines = run_script(f"{name}.py", *command, "--help", cwd=tmp_path).stdout.splitlines()
    flags = [i for i, line in enumerate(lines) if re.match("  -{1,2}[a-z]", line)]
    assert len(flags) >= 2
    for i in flags:  # the explanation stands behind two spaces, or on the next line
        assert re.search(r"\S  +\S", lines[i]) or lines[i + 1].startswith(" " * 20), lines[i]
    if not command:
        examples = re.findall(rf"^    python {name}\.py.*$", tree(name).body[0].value.value, re.M)
        assert examples
        assert set(examples) <= set(lines)

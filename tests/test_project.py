"""The house itself: its floors, its weight at import, its lists of versions, what its wheel carries, what lies where."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import edgelab
from edgelab import manifest, paths

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter that starts outside of the checkout."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ------------------------------------------------------------------------------------------------------- floors

FLOORS = [
    {"scheme", "qtensor", "recipe", "report", "device", "shape", "efficiency", "memory_plan", "paths", "manifest", "html_table"},
    {"kernels"},
    {"methods"},
    {"data", "model", "layers", "compress", "evaluate", "metrics", "ngram", "bundle", "hf", "bnb", "pretrain", "acceptance", "export"}
    | {"fit", "compare", "runtime", "governor", "sweep", "peers", "blocks", "transforms", "ranges", "sensitivity", "mixed_experts"}
    | {"stream", "checkpoint", "runtime_steps", "phone", "studies", "surgery", "structure", "sparsify", "train", "adapt"}
    | {"expert_stats", "expert_steps", "routing"}
    | {"dynamic", "early_exit", "sparse_attention", "cascade", "offload", "expert_cache", "fold", "vision", "lazy", "hot"}
    | {"interface", "startup", "devices", "deploy", "deploy_readme", "byte_map", "byte_formats"}
    | {"program", "decoder", "tile_store", "sampling", "batcher", "monitor", "simulate", "host", "meters", "probes"}
    | {"features", "private", "federated", "summary", "tradeoff", "sweep_space", "sweep_run", "sweep_table"}
    | {"sweep_search", "paired", "significance", "capstone"},
    {"plots", "svg", "words", "exercises", "page", "widgets", "matmul_lab", "clip_lab", "quantize_lab", "prune_lab", "train_lab"}
    | {"experts_lab", "export_lab", "atlas", "tile_picture", "byte_picture", "doctor", "explorer", "console", "cli", "cli_export"}
    | {"cli_run", "cli_predict", "cli_ledger", "device_lab", "chat", "governor_plots", "privacy_plots", "ledger", "claims"}
    | {"cli_sweep", "cli_report", "cli_reproduce", "explorer_plots", "explorer_words", "explorer_page", "explorer_lab", "start_lab"}
    | {"workshop"}
    | {"explorer_controls", "explorer_measure", "measure_here", "frame", "capstone_lab", "honest_lab", "handouts", "receipts"}
    | {"reproduce", "paper_tables"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
NOUNS_MAY_USE = {"numpy", "edgelab", *sys.stdlib_module_names}


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, module: str, is_package: bool) -> set[tuple[str, bool]]:
    """(imported dotted name, at import time?) of a module's source; `from a import b` counts as `a.b`."""
    found = set()

    def visit(node: ast.AST, eager: bool) -> None:
        if isinstance(node, ast.Import):
            found.update((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            found.update((f"{base}.{alias.name}", eager) for alias in node.names)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return  # never runs
        inner = eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(source), True)
    return found


def wrong_imports(module: str, imported: set[tuple[str, bool]]) -> list[str]:
    """What `module` imports against the rule: never from a floor below; nouns only NumPy, kernels no nouns."""
    parts = module.split(".")
    if len(parts) == 1:  # the package's own door: nouns at import, the rest on first use
        return [f"{module} imports {name} at once" for name, eager in imported if eager and not allowed_at_the_door(name)]
    if parts[1] not in FLOOR:
        return [f"{module} has no floor: give it one in FLOORS"]
    level, wrong = FLOOR[parts[1]], []
    for name, _ in sorted(imported):
        top, _, rest = name.partition(".")
        room = rest.split(".")[0]
        if top == "edgelab" and room in FLOOR:
            if FLOOR[room] > level:
                wrong.append(f"{module} (floor {level + 1}) imports {name} (floor {FLOOR[room] + 1})")
            if level == 1 and FLOOR[room] == 0:
                wrong.append(f"{module} is a kernel and imports the noun {name}: kernels take arrays and scalars")
        elif level == 0 and top not in NOUNS_MAY_USE:
            wrong.append(f"{module} is a noun and imports {name}: nouns use NumPy and the standard library only")
    return wrong


def allowed_at_the_door(name: str) -> bool:
    top, _, rest = name.partition(".")
    return FLOOR.get(rest.split(".")[0], 9) == 0 if top == "edgelab" else top in sys.stdlib_module_names


def all_imports() -> dict[str, set[tuple[str, bool]]]:
    files = sorted((ROOT / "edgelab").rglob("*.py"))
    named = {module_name(p, ROOT): p for p in files if "_data" not in p.parts}
    return {m: imports_of(p.read_text(encoding="utf-8"), m, p.name == "__init__.py") for m, p in named.items()}


def test_imports_only_go_up_the_floors():
    assert [line for module, imported in all_imports().items() for line in wrong_imports(module, imported)] == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("edgelab.scheme", "import torch", "nouns use NumPy"),
        ("edgelab.report", "def f():\n    from edgelab.model import load", "(floor 4)"),
        ("edgelab.kernels.pack", "from edgelab.scheme import QuantScheme", "kernels take arrays"),
        ("edgelab.methods.rtn", "from ..layers import QLinear", "imports edgelab.layers.QLinear (floor 4)"),
        ("edgelab.model", "from edgelab import plots", "(floor 5)"),
        ("edgelab.helpers", "", "has no floor"),
        ("edgelab", "import edgelab.layers", "at once"),
    ],
)
def test_the_floor_rule_sees_what_it_must(module, source, says):
    assert any(says in line for line in wrong_imports(module, imports_of(source, module, False)))


def test_no_import_cycles():
    imported = all_imports()
    edges = {}
    for module, found in imported.items():
        at_once = {target for name, eager in found if eager for target in (name, name.rpartition(".")[0])}
        edges[module] = at_once & set(imported) - {module, "edgelab"}  # every module has edgelab as its package
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"import cycle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*above, module))
            done.add(module)

    for module in edges:
        visit(module, ())


# ------------------------------------------------------------------------------------------------------- import

HEAVY = ("torch", "numba", "llvmlite", "transformers", "datasets", "evaluate", "pandas", "scipy", "plotly", "onnx", "typer", "rich", "tqdm")


def test_import_is_light():
    loaded = json.loads(python("import json, sys, edgelab; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in loaded if name in HEAVY] == []
    foreign = {name.partition(".")[0] for name in loaded} - {"edgelab", "numpy", *sys.stdlib_module_names, *sys.builtin_module_names}
    bare = json.loads(python("import json, sys; print(json.dumps(sorted(sys.modules)))"))
    assert foreign - {name.partition(".")[0] for name in bare} == set()


def test_every_verb_stays_a_verb():
    # the module edgelab.compress bears the name of its verb: importing it must not put itself in the verb's place
    code = """
        import edgelab, importlib
        for name, module in edgelab._LATER.items():
            first = getattr(edgelab, name)
            importlib.import_module(module)
            assert callable(first) and getattr(edgelab, name) is first, name
        from edgelab import compress
        from edgelab.compress import compress as same
        assert compress is same
    """
    assert python(textwrap.dedent(code)) == ""
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        _ = edgelab.compres


# ----------------------------------------------------------------------------------------------------- versions


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in (line for line in lines if line and not line.startswith("#")):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
        assert match, f"constraints.txt: {line!r} is not name==version"
        name = canonicalize_name(match[1])
        assert name not in found, f"constraints.txt pins {name} twice"
        found[name] = Version(match[2])
    assert list(found) == sorted(found), "constraints.txt is not in order"
    return found


def requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(reqs for extra, reqs in EXTRAS.items() if extra != "all")]
    return [Requirement(r) for reqs in lists for r in reqs]


def test_constraints_satisfy_the_project():
    pinned = pins()
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no version of {requirement.name}"
        assert version in requirement.specifier, f"{requirement} does not allow the tested {version}"
        assert version.local is None, f"{requirement.name}=={version} exists on one index only: drop the +{version.local}"
    backend = Requirement(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"][0])
    assert pinned[canonicalize_name(backend.name)] in backend.specifier


def test_constraints_are_the_whole_closure_and_what_runs_here():
    pinned, todo, seen = pins(), requirements(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, tuple(sorted(requirement.extras)))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue  # a CUDA build of torch names its own companions exactly
        assert name in pinned, f"{name} {distribution.version} comes with the extras, but constraints.txt does not pin it"
        here = Version(distribution.version)
        assert here.public == pinned[name].public, f"{name} {here} is installed, tested is {pinned[name]}; make test installs that"
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(needed)
    assert ("torch", ()) in seen


def test_all_names_every_extra():
    (everything,) = (Requirement(r) for r in EXTRAS["all"])
    assert everything.extras == set(EXTRAS) - {"all", "litert"}  # which needs an environment of its own


def test_conda_environment_agrees():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    (by_pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    wanted = dict(d.split("=", 1) if "=" in d else (d, "") for d in plain)
    assert set(wanted) == {"python", "pip"}, "other packages come through pip, so that there is one list of versions"
    assert Version(wanted["python"]) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert by_pip[0] == "--constraint constraints.txt"
    editable = re.fullmatch(r"--editable \.\[([\w,]+)\]", by_pip[1])
    assert editable and set(editable[1].split(",")) <= set(EXTRAS)
    assert len(by_pip) == 2


def test_makefile_and_readme_name_real_extras_and_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for stamp in re.findall(r"\$\(VENV\)/\.([a-z-]+)", makefile):
        assert stamp in ("made", "core") or set(stamp.split("-")) <= set(EXTRAS), f"Makefile: .{stamp} names no extra"
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert targets >= {"demo", "test", "lab", "bench", "notebooks", "pretrain"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|\s+#|$)", readme, flags=re.MULTILINE)) <= targets
    for extras in re.findall(r"\.\[([\w,]+)\]", readme):
        assert set(extras.split(",")) <= set(EXTRAS)


def test_the_readme_lists_every_lesson_and_every_file_as_they_are():
    run = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_maker_of_those_lists_sees_what_is_missing(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("ci_readme", ROOT / ".ci" / "readme.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    monkeypatch.setattr(maker, "ROOT", tmp_path)
    (tmp_path / "edgelab").mkdir()
    (tmp_path / "edgelab" / "__init__.py").write_text('"""The door. More."""\n')
    room = tmp_path / "edgelab" / "room.py"
    room.write_text('"""What it is,\nin short: this. And more.\n\nMuch more.\n"""\n')
    assert "- `room.py`: What it is, in short: this\n" in maker.files({"room": 1}) + "\n"
    room.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"room\.py has no docstring"):
        maker.files({"room": 1})
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    lesson = tmp_path / "notebooks" / "src" / "00_a.py"
    lesson.write_text("# %% [markdown]\n# # 00 · A\n#\n# **Claim: it\n# holds.**\n")
    assert maker.lessons().endswith("| [00 · A](notebooks/00_a.ipynb) | It holds. |")
    lesson.write_text("# %% [markdown]\n# # 00 · A\n")
    with pytest.raises(ValueError, match="no claim"):
        maker.lessons()
    assert maker.renewed("a <!-- x -->old<!-- /x --> b", "x", "new") == "a <!-- x -->\nnew\n<!-- /x --> b"
    with pytest.raises(ValueError, match="each once"):
        maker.renewed("a", "x", "new")


def test_make_clean_leaves_what_is_the_users():
    (recipe,) = re.findall(r"^clean:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not re.search(r"\bruns\b|\bdata\b|VENV", recipe)


@pytest.mark.slow
def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    from edgelab import layers, set_threads

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example, methods, structure, device, kernels = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "max_docs=8" in example
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGELAB_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(compile(example.replace("max_docs=8", "max_docs=2"), "README.md", "exec"), names)
    assert names["small"].coverage.expert_share == 1.0
    assert names["report"].models() == ["fp", "int4"]
    assert (tmp_path / "runs" / "edge-moe-int4" / "edgelab.json").is_file()
    assert "tokens=8192" in methods
    exec(compile(methods.replace("tokens=8192", "tokens=1024"), "README.md", "exec"), names)
    assert names["small3"].coverage.expert_share == 1.0 and "int3-g32" in {r.scheme for r in names["small3"].coverage}
    assert "steps=100" in structure and "tokens=200_000" in structure
    exec(compile(structure.replace("steps=100", "steps=2").replace("200_000", "4_000"), "README.md", "exec"), names)
    assert names["smaller"].coverage.expert_share == 1.0
    assert edgelab.Recipe.from_json((tmp_path / "mine.json").read_text()) == names["smaller"].recipe
    exec(compile(device, "README.md", "exec"), names)
    assert len(names["answer"].tokens) == 16 and names["runtime"].plan.mapped_bytes > 0 and list((tmp_path / "cache" / "tiles").iterdir())
    before = layers.set_kernel("numba")
    try:
        exec(compile(kernels, "README.md", "exec"), names)
        assert names["logits"].isfinite().all()
        layers.set_activations(names["small"].model, "float32")
        with torch.inference_mode():
            assert not torch.equal(names["small"].model(names["ids"]).logits, names["logits"])  # they were int8
    finally:
        layers.set_kernel(before)
        set_threads(None)


# --------------------------------------------------------------------------------------------- data and the wheel


def test_data_is_as_recorded():
    assert manifest.check() == []


def test_the_ledger_sees_every_kind_of_change(tmp_path):
    (tmp_path / "edge-moe").mkdir()
    for name in ("README.md", "edge-moe/config.json", "edge-moe/model.safetensors"):
        (tmp_path / name).write_text("as it was", encoding="utf-8")
    manifest.write(tmp_path)
    assert manifest.check(tmp_path) == []
    (tmp_path / "edge-moe/config.json").write_text("not so it was", encoding="utf-8")  # another length
    (tmp_path / "edge-moe/model.safetensors").write_text("aS it was", encoding="utf-8")  # the same length
    (tmp_path / "README.md").unlink()
    (tmp_path / "edge-moe/README.md").write_text("new", encoding="utf-8")
    told = "\n".join(manifest.check(tmp_path))
    assert "README.md is recorded but not there" in told
    assert "edge-moe/config.json has 13 bytes, recorded are 9" in told
    assert "edge-moe/model.safetensors has other contents" in told
    assert "edge-moe/README.md is there but not recorded" in told


def test_a_file_of_unknown_origin_stays_out_of_the_ledger(tmp_path):
    (tmp_path / "found-somewhere.bin").write_bytes(b"?")
    with pytest.raises(ValueError, match="no known origin"):
        manifest.write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        manifest.check(tmp_path)


def test_data_dir_follows_the_environment(tmp_path, monkeypatch):
    assert paths.data_dir() == ROOT / "data"
    monkeypatch.setenv("EDGELAB_DATA", str(tmp_path))
    assert paths.data_dir() == tmp_path.resolve()
    monkeypatch.setenv("EDGELAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="unset it"):
        paths.data_dir()


def test_the_wheel_carries_its_data(tmp_path):
    # a network would only be needed to fetch the build backend, which the test extra already brings
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = set(z.namelist())
        z.extractall(tmp_path / "site")
    recorded = json.loads((ROOT / "data/manifest.json").read_text(encoding="utf-8"))["files"]
    assert {f"edgelab/_data/{name}" for name in [*recorded, "manifest.json"]} <= inside
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edgelab").rglob("*.py")}
    assert sources <= inside
    assert not [name for name in inside if name.startswith(("tests/", "notebooks/", "data/"))]
    site = str(tmp_path / "site")
    said = python("from edgelab import manifest, paths; print(paths.data_dir(), manifest.check())", PYTHONPATH=site)
    assert said == f"{Path(site, 'edgelab', '_data').resolve()} []"
    assert python("from edgelab import doctor; print(doctor.constraints()['torch'])", PYTHONPATH=site) == str(pins()["torch"])
    (entry_points,) = Path(site).glob("*.dist-info/entry_points.txt")
    assert "edgelab = edgelab.cli:app" in entry_points.read_text(encoding="utf-8")
    assert list(Path(site).glob("*.dist-info/licenses/LICENSE"))


# -------------------------------------------------------------------------------------------------- what lies where

TOP = ("notebooks", "edgelab", "data", "tests", "environment.yml", "README.md", "pyproject.toml", "constraints.txt", "Makefile")
TOP += ("LOG.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "binder", ".*")


def tracked() -> list[str]:
    """The files of the repository: git's list, or in an unpacked archive all that is neither hidden nor a cache."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and (ROOT / ".git").exists():
        return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    found = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    return [p.as_posix() for p in found if not any(part.startswith(".") or part == "__pycache__" for part in p.parts)]


def test_the_top_level_holds_only_what_was_agreed():
    tops = {name.split("/")[0] for name in tracked()}
    assert [top for top in sorted(tops) if not any(fnmatchcase(top, pattern) for pattern in TOP)] == []


def test_files_are_small_outside_of_data():
    limit = {name: 200_000 if name.endswith(".ipynb") else 400_000 for name in tracked() if not name.startswith("data/")}
    assert [f"{name} is larger than {most}" for name, most in limit.items() if (ROOT / name).stat().st_size > most] == []


def test_nothing_loads_code_with_weights():
    unsafe = re.compile(
        r"\bpickle\.loads?\(|weights_only\s*=\s*False|trust_remote_code\s*=\s*True|verify\s*=\s*False|allow_pickle\s*=\s*True"
    )
    files = [name for name in tracked() if name.endswith(".py") and name != "tests/test_project.py"]
    hits = [f"{name}:{i}" for name in files for i, line in enumerate((ROOT / name).open(encoding="utf-8"), 1) if unsafe.search(line)]
    assert hits == []


def test_the_network_guard_guards(no_network):
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("192.0.2.1", 443), timeout=1)  # TEST-NET-1: reaches nobody (RFC 5737)
    with socket.socket() as s, pytest.raises(OSError, match=r"reached for 192\.0\.2\.1:443"):
        s.connect(("192.0.2.1", 443))
    assert len(no_network) == 2
    no_network.clear()  # else this test would fail, as any other would
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    assert no_network == []

"""`import exaonepath` and the command: cheap to import, complete, and known to transformers in either order."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import exaonepath

HEAVY = ("torch", "transformers", "numpy", "h5py", "openslide", "huggingface_hub", "pandas", "matplotlib")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_in(warm, code, *arguments):
    done = warm.run(code, *arguments)
    assert done.returncode == 0, done.stderr


def loaded_after(code):
    """Which of the heavy packages a new interpreter has imported after `code`."""
    return json.loads(run(f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"))


def test_importing_the_package_is_cheap():
    assert loaded_after("import exaonepath; dir(exaonepath); exaonepath.__version__") == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["encode", "--help"], 0),
        (["train", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["ablate", "--help"], 0),
        ([], 2),
        (["nothing"], 2),
        (["encode"], 2),
        (["encode", "a.svs", "--out", "x", "--nope"], 2),
        (["features", "a.svs", "b.h5", "--out", "o.h5", "--batch-size", "0"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_version_and_usage_errors_import_nothing_heavy(arguments, code):
    program = f"""
import contextlib, io, sys
sys.argv = ["exaonepath", *{arguments!r}]
from exaonepath.cli.app import main
try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main()
except SystemExit as exc:
    assert exc.code == {code}, exc.code
"""
    assert loaded_after(program) == []


def test_every_name_of_the_front_door_leads_to_its_definition():
    assert sorted(exaonepath.__all__) == dir(exaonepath)
    stub = ast.parse((Path(exaonepath.__file__).parent / "__init__.pyi").read_text())
    names = {alias.asname: node for node in stub.body for alias in node.names}
    assert set(names) == set(exaonepath.__all__)
    for name, node in names.items():
        if node.module is None:
            assert getattr(exaonepath, name) is importlib.import_module(f"exaonepath.{name}")
        else:
            home = importlib.import_module(f"exaonepath.{node.module}")
            assert getattr(exaonepath, name) is getattr(home, name)


def test_every_name_of_the_front_door_is_documented():
    for name in exaonepath.__all__:
        value = getattr(exaonepath, name)
        if name != "__version__":
            assert (value.__doc__ or "").strip(), name


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        exaonepath.nothing_of_the_kind  # noqa: B018


AUTO = """
config = transformers.AutoConfig.for_model("exaonepath_slide_encoder")
assert type(config).__module__ == "exaonepath.encoders.configuration", type(config)
config.wsi.update(input_dim=8, embed_dim=8, depth=1, num_heads=2)
model = transformers.AutoModel.from_config(config)
assert type(model).__name__ == "ExaonePathSlideEncoderModel", type(model)
folder = sys.argv[1]
model.save_pretrained(folder)
assert type(transformers.AutoModel.from_pretrained(folder)) is type(model)
assert type(transformers.AutoConfig.from_pretrained(folder)) is type(config)
"""


@pytest.mark.parametrize(
    "order",
    [
        "import exaonepath, importlib\nimport transformers\nimportlib.reload(exaonepath)",
        "from transformers import AutoModel, AutoConfig\nimport exaonepath, transformers",
        "import transformers.models.auto.configuration_auto\nimport exaonepath",
    ],
)
def test_transformers_builds_our_models_in_either_order(warm_torch, order, tmp_path):
    run_in(warm_torch, f"import sys\n{order}\n{AUTO}", tmp_path / "model")


def test_another_model_is_still_transformers_own(warm_torch, tmp_path):
    code = """
import exaonepath, sys, transformers
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
config = transformers.BertConfig(**sizes)
model = transformers.AutoModel.from_config(config)
model.save_pretrained(sys.argv[1])
assert type(transformers.AutoModel.from_pretrained(sys.argv[1])) is transformers.BertModel
"""
    run_in(warm_torch, code, tmp_path / "bert")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("patches", "patchfy SlideImage read_patches"),
        ("feature_extraction", "extract_features read_features PatchFailure"),
        ("models", "ExaonePathModel ExaonePathSlideEncoderModel"),
        ("models.loading", "load_patch_encoder load_slide_encoder LoadedEncoder"),
        ("models.multimodal", "PairwiseSigmoidLoss ExaonePathAlignmentModel PatientBatch"),
    ],
)
def test_import_paths_of_0_1_still_work(path, names):
    module = importlib.import_module(f"exaonepath.{path}")
    for name in names.split():
        value = getattr(module, name)
        assert getattr(exaonepath, name, value) is value


def test_deprecated_import_paths_warn_once_with_the_replacement(warm_package):
    """In one process, each module as if it were imported first."""
    code = """
import sys, warnings
for module in ("models", "models.loading", "models.multimodal"):
    for name in [name for name in sys.modules if name.startswith("exaonepath.models")]:
        del sys.modules[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(f"import exaonepath.{module}", "<string>", "exec"))
    caught = [w for w in caught if "exaonepath.models" in str(w.message)]
    assert len(caught) == 1 and caught[0].category is DeprecationWarning, (module, caught)
    assert caught[0].filename == "<string>" and "from exaonepath import" in str(caught[0].message), caught[0]
"""
    run_in(warm_package, code)


def test_import_paths_of_the_original_are_not_deprecated(warm_torch):
    run_in(
        warm_torch,
        "import warnings; warnings.simplefilter('error', DeprecationWarning); import exaonepath; "
        "import exaonepath.patches, exaonepath.feature_extraction",
    )

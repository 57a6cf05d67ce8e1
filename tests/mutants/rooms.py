"""The modules that are mutated, and the tests of each: its own file first, then the others of its room."""

from __future__ import annotations

PARITY = "tests/parity/test_modules.py"
SIZES, PRODUCTS = "tests/models/test_presets.py", "tests/models/test_products.py"
LOG = "tests/test_training_log.py"
TASKS = tuple(f"tests/tasks/test_{name}.py" for name in ("declared", "task", "malformed"))  # of all tasks alike
FIGURES = "tests/tasks/test_agreement.py"


def _own(folder: str, tests: str, names: str, *others: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of modules whose own tests are `tests`/test_<name>.py."""
    return {f"{folder}/{name}.py": (f"{tests}/test_{name}.py", *others) for name in names.split()}


# Room -> module -> its test files or folders.
ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "losses": _own("crab_jax", "tests", "losses"),
    "optim": _own("crab_jax", "tests", "optim"),
    "scoring": _own("crab_jax/evaluation", "tests", "scoring", "tests/test_evaluate.py"),
    "tasks": _own("crab_jax/tasks", "tests/tasks", "avcap avs avvp ref_avs segmentation", *TASKS, FIGURES)
    | _own("crab_jax/tasks", "tests/tasks", "arig ave avqa times", *TASKS, "tests/tasks/test_round_trip.py")
    | {f"crab_jax/tasks/{name}.py": TASKS for name in ("task", "text", "rows", "avs_classes", "placeholders")},
    "batching": _own("data_pipelines", "tests/data_pipelines", "batching"),
    "mixture": _own(
        "data_pipelines",
        "tests/data_pipelines",
        "mixture",
        *(f"tests/data_pipelines/test_{name}.py" for name in ("index", "several", "sample")),
    ),
    "inference": _own("crab_jax", "tests", "inference", "tests/test_evaluate.py"),
    "generate": _own("crab_jax", "tests", "generate", "tests/parity/test_generation.py"),
    "quantize": {"crab_jax/models/quantize.py": ("tests/models/test_fused.py",)},
    "checkpoints": {
        f"crab_jax/checkpoints/{name}.py": ("tests/test_checkpoints.py", "tests/test_finite.py")
        for name in ("digests", "models", "orbax", "run_steps", "stored")
    }
    | {"crab_jax/checkpoints/finite.py": ("tests/test_finite.py",)},
    "models": _own(
        "crab_jax/models", "tests/models", "beats clip crab llama lora mask_decoder qformer", SIZES, PRODUCTS, PARITY
    )
    | _own("crab_jax/models", "tests/models", "attention dropout")
    | {"crab_jax/models/generating.py": ("tests/models/test_fused.py", PRODUCTS)}
    | _own(
        "crab_jax/models", "tests/models", "layers", "tests/models/test_lora.py", "tests/models/test_llama.py", PRODUCTS
    )
    | {"crab_jax/models/presets.py": (SIZES,)},
    "train": _own("crab_jax", "tests", "train", LOG)
    | {f"crab_jax/training/{name}.py": (LOG, "tests/test_numbers.py") for name in ("metrics_log", "skip_guard")}
    | {"crab_jax/training/train_step.py": ("tests/test_numbers.py",)},
}

"""Which extra brings a library that is not installed."""

from modelstock.errors import ModelstockError

# The libraries that this package imports beyond its core, by the extra of pyproject.toml that brings them.
LIBRARIES = {
    "statistics": ("safetensors", "scipy", "statsmodels"),
    "train": (
        "PIL",
        "ftfy",
        "huggingface_hub",
        "markdown",
        "matplotlib",
        "open_clip",
        "psutil",
        "pydantic",
        "ruamel",
        "timm",
        "torch",
        "torchvision",
        "webdataset",
    ),
    "text": ("tokenizers", "transformers"),
    "figures": ("matplotlib",),
    "pipeline": ("dvc", "dvc_data", "filelock", "httpx", "mlflow", "networkx", "pandas", "prefect"),
    "cluster": ("psycopg2",),
    "datasets": ("datasets",),
}


def missing_extra(command: str, error: ModuleNotFoundError) -> ModelstockError:
    """The one line for a library that is missing: which extra to install.

    Raises:
        ModuleNotFoundError: the error itself, where no extra brings the library.
    """
    library = (error.name or "").partition(".")[0]
    for extra, libraries in LIBRARIES.items():
        if library in libraries:
            enough = "train" if extra == "statistics" and command != "modelstock significance" else extra
            return ModelstockError(
                command,
                got=f"no library {library}",
                expected=f"the extra {enough}",
                cure=f"pip install 'modelstock[{enough}]'",
            )
    raise error

"""What all tests share: one thread, no network, a data folder of their own, tiny models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hasten.zoo import catalogue
from tests import models

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config: pytest.Config) -> None:
    """Declare our marker; a warning that comes from hasten itself fails the test."""
    config.addinivalue_line(
        "markers", "zoo: needs the trained zoo models and takes more than a second"
    )
    config.addinivalue_line("filterwarnings", r"error:::hasten(\..*)?")


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests write ledgers and parts here, never into the user's own data folder."""
    folder = tmp_path_factory.mktemp("hasten_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_HOME", str(folder))
        yield folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder and a working folder that must stay as they are."""
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """`tiny_llama(seed=0, num_key_value_heads=4, ...)`: a live random model (`models.tiny_model`)."""
    return lambda **overrides: models.tiny_model("llama", **overrides)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama checkpoint folder with its tokenizer; do not write into it."""
    return models.save_checkpoint(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], Path]:
    """`zoo("code-lm")`: folder of a shipped model; skips only where no weights lie beside the code."""

    def folder(name: str) -> Path:
        if not catalogue.SHIPPED.is_dir():
            pytest.skip(f"the zoo's weights are not here ({catalogue.SHIPPED})")
        return catalogue.path(name)

    return folder

"""What is said of a machine, and what is not."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path

import pytest
import torch

from hasten.measure import machine as module
from hasten.measure.machine import Machine, machine, versions


def test_this_machine() -> None:
    found = machine()
    assert 1 <= found.physical_cores <= found.logical_cores <= (os.cpu_count() or 1)
    assert found.torch_threads == torch.get_num_threads()
    assert found.memory_bytes > 2**27
    assert found.cpu
    assert found.python == platform.python_version()
    assert found.fingerprint == machine().fingerprint
    assert json.loads(json.dumps(found.to_dict()))["fingerprint"] == found.fingerprint


def test_no_host_name_and_no_path() -> None:
    words = json.dumps(machine().to_dict())
    if len(platform.node()) > 3:
        assert platform.node() not in words
    assert str(Path.cwd()) not in words


def test_the_fingerprint_follows_the_hardware_only() -> None:
    here = machine()

    def changed(**fields: object) -> Machine:
        return dataclasses.replace(here, **fields)  # type: ignore[arg-type]

    assert changed(cpu="another").fingerprint != here.fingerprint
    assert changed(physical_cores=99).fingerprint != here.fingerprint
    assert changed(accelerator="a GPU").fingerprint != here.fingerprint
    assert changed(torch_threads=99, python="9.9").fingerprint == here.fingerprint
    assert changed(memory_bytes=here.memory_bytes + 4096).fingerprint == here.fingerprint


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_is_respected() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        found = machine()
        assert (found.logical_cores, found.physical_cores) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)


def test_a_container_limits_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(module, "_groups", lambda controller: iter([tmp_path]))
    found = machine()
    assert found.logical_cores == found.physical_cores == 1
    assert found.memory_bytes == 2**30
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine().memory_bytes > 2**27


def test_versions_name_what_matters() -> None:
    found = versions()
    assert set(found) == {"hasten", "torch", "transformers", "numpy", "python"}
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in found.values())

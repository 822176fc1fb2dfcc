"""On what a result was made: versions, machine, device, git revision. No path, host or user name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "peft",
    "datasets",
    "gymnasium",
    "scikit-learn",
    "joblib",
)


def describe(module: str = "metazoo") -> dict[str, Any]:
    """The environment of this process.

    Args:
        module: the package whose source tells the git revision.

    Returns:
        versions (python, the libraries that are installed, every distribution of metazoo), platform, cpu
        (name and the count that this process may use), device, and git: revision and dirty, both None if the
        source is not tracked by a repository.
    """
    import joblib

    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"name": _cpu_name(), "count": joblib.cpu_count()},
        "device": device(),
        "git": git(module),
    }


def versions() -> dict[str, str]:
    """Versions of python, of the libraries a result may depend on, and of metazoo and its packages."""
    installed = {(dist.metadata["Name"] or "").lower(): dist.version for dist in importlib.metadata.distributions()}
    ours = sorted(name for name in installed if name == "metazoo" or name.startswith("metazoo-"))
    wanted = [name for name in LIBRARIES if name in installed]
    return {"python": platform.python_version(), **{name: installed[name] for name in [*wanted, *ours]}}


def device() -> str:
    """Name of the accelerator that torch would use, or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def git(module: str = "metazoo") -> dict[str, Any]:
    """Revision of the repository that tracks the source of ``module``, and whether code was changed since.

    Results are outputs: a change in a folder ``results`` alone leaves the tree clean.
    """
    nothing: dict[str, Any] = {"revision": None, "dirty": None}
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return nothing
    source = Path(spec.origin)
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return nothing  # an installed copy, even one that lies inside somebody's repository
    revision = _git(source.parent, "rev-parse", "HEAD")
    changes = _git(source.parent, "status", "--porcelain", "--", ":/", ":(top,exclude,glob)**/results/**")
    if revision is None or changes is None:
        return nothing
    return {"revision": revision, "dirty": bool(changes)}


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Start to measure the peak anew (Linux only; elsewhere the peak is that of the whole process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb() -> float:
    """Largest resident memory of this process since :func:`reset_peak_memory`, in MB (10⁶ bytes)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round((peak if sys.platform == "darwin" else peak * 1024) / 1e6, 1)

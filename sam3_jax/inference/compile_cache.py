"""Keeps compiled programs on disk, so that a second start does not compile again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

ENVIRONMENT = "SAM3_JAX_CACHE_DIR"  # another folder, or "off"
MIN_COMPILE_SECONDS = 1.0


def default_folder() -> Path:
    """``sam3_jax`` in the user's cache folder, by the custom of the platform."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sam3_jax"


def enable() -> None:
    """Switches jax's persistent compilation cache on for this process.

    A cache that the program or ``JAX_COMPILATION_CACHE_DIR`` has already chosen is left alone.
    The environment variable ``SAM3_JAX_CACHE_DIR`` names another folder or says "off". A folder
    that cannot be written to costs a warning of jax and no more.
    """
    wanted = os.environ.get(ENVIRONMENT) or str(default_folder())
    if wanted == "off" or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", wanted)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    # jax decides once a process, at its first compilation, whether there is a cache.
    compilation_cache.reset_cache()

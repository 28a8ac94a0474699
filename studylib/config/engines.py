"""llama.cpp as an engine that may be there or not, known without loading it."""

import importlib.util

INSTALL_LLAMA_CPP = "pip install '.[llama-cpp]'"
AUTO, ALWAYS, NEVER = WHEN = ("auto", "always", "never")  # an arm of llama.cpp's is run: where it is installed, ...


def llama_cpp_installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def check_llama_cpp() -> None:
    """ValueError, with how to install it, where it is not."""
    if not llama_cpp_installed():
        raise ValueError(f"llama.cpp is not installed; use {INSTALL_LLAMA_CPP}")

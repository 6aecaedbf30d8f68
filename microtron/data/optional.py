"""Packages that not every run needs: imported when something asks for them, named when missing."""

import importlib
from typing import Any

from microtron.errors import UserError


def import_package(module: str) -> Any:  # noqa: ANN401
    """The module. Raises: UserError where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"this needs the package {package!r}, which cannot be imported ({error}); pip install "
            f"{package}"
        ) from error

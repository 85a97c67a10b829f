__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING

from . import measure, run

# `measure` and `run` name a subpackage and a function. A subpackage becomes an attribute of this package when it is
# imported for the first time, which is here, so that no later import can put it in the place of the function; modules
# inside it are found by their full names, in whatever order things are imported.
_packages = {"measure": measure, "run": run}
del measure, run
if TYPE_CHECKING: from .api import compare, doctor, dpo, measure, run, sft
__all__ = ["compare", "doctor", "dpo", "measure", "run", "sft"]


def __getattr__(name: str):
    "A function of `api`, imported when it is asked for."
    if name not in __all__: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(".api", __name__), name)
    if name in _packages: function.__dict__ = vars(_packages[name])  # for `import s3ft_nb.measure.metrics as m`
    globals()[name] = function
    return function


def __dir__() -> list[str]: return sorted({*globals(), *__all__})

"""decotrain: train one model on machines that share nothing but the internet."""

from decotrain.errors import Error

__version__ = "0.1.0"
__all__ = ["Error", "__version__"]

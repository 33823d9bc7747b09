"""One small network that segments and detects, taught by bigger ones."""

__version__ = "0.1.0"

"""The config: ``load`` reads YAML with ``base`` files and ``key=value`` overrides into typed, strict
sections, ``dump`` writes it.

base.py: what a section is and the kinds of value; schedules.py: values that change while training;
data_sets.py, teaching.py, sections.py: all others, up to ``Config``; reading.py: YAML, overrides, and error
messages.
"""

from .base import Count, Fraction, Natural, Number, PathText, Positive, Section
from .data_sets import SET_KEYS, SHARED_KEYS, TRAINING_ONLY, DataSet
from .reading import NAMES, dump, load, parse, parse_schedule, read_yaml, validate
from .schedules import SCHEDULES
from .sections import Config, Model
from .teaching import Teacher

__all__ = [
    "NAMES",
    "SCHEDULES",
    "SET_KEYS",
    "SHARED_KEYS",
    "TRAINING_ONLY",
    "Config",
    "Count",
    "DataSet",
    "Fraction",
    "Model",
    "Natural",
    "Number",
    "PathText",
    "Positive",
    "Section",
    "Teacher",
    "dump",
    "load",
    "parse",
    "parse_schedule",
    "read_yaml",
    "validate",
]

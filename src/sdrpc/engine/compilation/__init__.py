"""Programs that repeat, compiled by torch's Inductor in a process beside this one."""

from .compiler import Compiler, missing
from .faster import CompiledProgram, Faster
from .job import Origin

__all__ = ["CompiledProgram", "Compiler", "Faster", "Origin", "missing"]

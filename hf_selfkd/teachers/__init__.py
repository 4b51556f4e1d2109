"""Teachers: where soft targets come from."""

from .base import Teacher
from .history import HistoryTeacher
from .weights import EMATeacher, SnapshotTeacher


__all__ = ["EMATeacher", "HistoryTeacher", "SnapshotTeacher", "Teacher"]

"""Teachers: where soft targets come from."""

from .base import Taught, Teacher
from .history import HistoryStore, HistoryTeacher
from .predictions import Predictions, PredictionsTeacher
from .rank import RankTeacher
from .weights import EMATeacher, SnapshotTeacher


__all__ = [
    "EMATeacher",
    "HistoryStore",
    "HistoryTeacher",
    "Predictions",
    "PredictionsTeacher",
    "RankTeacher",
    "SnapshotTeacher",
    "Taught",
    "Teacher",
]

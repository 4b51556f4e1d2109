"""The prediction history: past predictions of every sample, stored, exchanged and saved."""

from .addresses import NEVER, WARM_START
from .codec import Codec
from .plan import Plan, plan_history
from .predictions import PredictionHistory


__all__ = ["NEVER", "WARM_START", "Codec", "Plan", "PredictionHistory", "plan_history"]

"""What a training is going to do, and what the figures of one that is over say about it."""

from .cost import short_epochs, step_times
from .diagnosis import Symptoms, diagnose, softer_targets_help
from .plan import plan_of
from .symptoms import symptoms_of


__all__ = ["Symptoms", "diagnose", "plan_of", "short_epochs", "softer_targets_help", "step_times", "symptoms_of"]

from models.classifier import Classifier
from models.dit import PRESETS, DiT, student_from_teacher

__all__ = ["PRESETS", "Classifier", "DiT", "student_from_teacher"]

from models.dit import PRESETS, DiT, student_from_teacher

__all__ = ["PRESETS", "DiT", "student_from_teacher"]

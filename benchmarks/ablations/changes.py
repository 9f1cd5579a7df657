"""How a patch takes hold: a name that the scripts or networks have is replaced, in this process."""

from collections.abc import Sequence
from typing import Any

import train_student
import train_student_mnist
import train_teacher
import train_teacher_mnist

TEACHERS, STUDENTS = (train_teacher, train_teacher_mnist), (train_student, train_student_mnist)


def change(modules: Sequence[Any], name: str, new: Any) -> None:
    """Replace a name in each module or class that has it."""
    for module in modules:
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name} any more; the patch must follow it")
        setattr(module, name, new)

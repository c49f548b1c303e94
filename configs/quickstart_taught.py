"""The quickstart with codes of a student that says of images what the encoder says of their crops.

    python -m dlc_jax.main --config=configs/quickstart_taught.py

What the student's positions forget, and what it is worth: docs/composition.md.
"""

RECIPE = {
    "like": "quickstart.py",
    "steps": ("encoder", "student", "codes", "probe", "prior", "generator", "samples"),
    "student.like": "encoder",
    "student.teacher": "encoder",
    "student.objective.dino": 0.0,
    "student.objective.koleo": 0.0,
    "student.objective.consistency": 0.0,
    "student.objective.plain": 1.0,
    "student.objective.momentum": (0.98, 0.98),
    "student.optimizer.learning_rate": 1e-3,
    "student.train.steps": 400,
    "codes.encoder": "student",
    "probe.encoder": "student",
    "samples.encoder": "student",
}

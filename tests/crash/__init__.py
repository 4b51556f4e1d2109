"""
Trainings that are killed at random moments and go on: does anything differ from one that nobody disturbed?

`python -m crash` (with `tests` among the paths, as `make crash-test` has it) forks small trainings from one process
that has imported everything, kills a random process of them with SIGKILL, resumes, maybe several times, and compares
what is left with an undisturbed training, to the bit.
"""

"""LARK: choose, weigh and train on the teacher-written trajectories a student learns fastest from."""

__version__ = "0.2.0.dev0"

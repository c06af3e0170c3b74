"""LARK: choose, weigh and train on the teacher-written trajectories a student learns fastest from."""

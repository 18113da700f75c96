"""Benchmarks: tasks, judges, running and scoring.

`tasks/` says what each benchmark asks and how it is counted; `score` turns stored answers into
numbers with intervals; `run` gets the answers; `judging` has them graded.
"""

"""The parts of ``recipes/label_noise.py``: arms, tasks, runs, tables and a figure."""

"""Time two models side by side: time to first token, time per token, memory, energy, and distance from the floor.

`worker` opens a model in its own process, `machine` reads the machine's meters, `bench` has the sweep and `report` its
tables and plots. The demo uses the same workers.
"""

"""Timing a model beside another: time to the first token, time per token, memory, energy, and how far from the floor.

`worker` opens a model in a process of its own, `machine` reads the machine's meters, `bench` has the sweep and `report`
its tables and plots. The demo times with the same workers.
"""

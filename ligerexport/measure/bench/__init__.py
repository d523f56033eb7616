"""Measuring a model beside another: time to the first token, time a token, memory, energy, and how far from the floor.

`engine` makes one face of artifacts, converted checkpoints and Transformers, `worker` puts one into a process of its
own, `machine` asks the machine, `run` has the sweep, `report` its tables and plots. The demo times with the same
workers.
"""

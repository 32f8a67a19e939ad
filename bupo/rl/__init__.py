"""The training loop, with one module for each stage:

prompts -> rollouts -> rewards -> advantages -> update -> metrics

loop.py runs the stages in this order. Stages do not import one another: they exchange the types of
bupo.types. schedule decides which policy a step trains; evaluator and checkpoint run between steps.
"""

"""The training loop, one file per arrow:

prompts -> rollouts -> rewards -> advantages -> update -> metrics; schedule says which policy is
trained, evaluation and checkpoint stand beside. loop.py reads them in this order; stages do not
import one another, they exchange types.
"""

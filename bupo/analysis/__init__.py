"""What python -m bupo.analyze is made of: plan.py (before weights are loaded), texts.py (data to
measured texts), files.py (what it writes). What is computed is in bupo.internal.
"""

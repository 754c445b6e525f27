"""Where fine-tuned weights lie: norms, angles, the shell around a centre, and what that means for merging.

claims.py    a claim of the paper, or an open question, with what was measured of it

What is measured from weights alone needs neither torch nor a model, and any checkpoint will do.
"""

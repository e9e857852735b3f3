"""Mixture-of-experts layers for any PyTorch project: this folder imports torch and jaxtyping only.

Letters, here and in every annotation: b images, n tokens, d width, e experts, p slots per expert,
k experts chosen per token, h hidden width of an expert; in sparse routers g groups of images, s tokens of a group,
r rows that experts compute, c choices of all tokens of a group.
"""

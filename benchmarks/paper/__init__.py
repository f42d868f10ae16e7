"""The experiments of Blondel et al., Efficient and Modular Implicit Differentiation,
arXiv:2105.15183, on two cores.
"""

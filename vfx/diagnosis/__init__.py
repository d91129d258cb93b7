"""What merging did to a network: vanishing features, variance, collapses, barriers, and the data's part in it.

``diagnose`` compares a merged network with its edges in one pass over the data, ``barrier`` follows the line between
two edges, ``linear`` decomposes linear networks exactly, ``select`` chooses calibration data by difficulty.
"""
